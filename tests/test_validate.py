"""The gate refuses every kind of malformed dataset in one line that names what is wrong, and no good one."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import malformed
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.errors import BadInput
from data.lerobot import write_episodes
from data.validate import check_dataset


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return malformed.tiny_dataset(tmp_path_factory.mktemp("good") / "tiny")


@pytest.fixture(scope="module")
def good_v21(good: Path) -> Path:
    return malformed.to_v21(good, good.parent / "tiny_v21")


def refusal(root: Path) -> str:
    with pytest.raises(BadInput) as caught:
        check_dataset(root)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 200 and line.isprintable(), line
    return line


@pytest.mark.parametrize("kind", malformed.KINDS)
def test_a_malformed_dataset_is_refused_in_one_line(kind: str, good: Path, tmp_path: Path) -> None:
    break_it, named = malformed.KINDS[kind]
    bad = shutil.copytree(good, tmp_path / "bad")
    break_it(bad)
    line = refusal(bad)
    assert all(part in line for part in named), line


@pytest.mark.parametrize("kind", malformed.V21_KINDS)
def test_a_malformed_v21_dataset_is_refused_in_one_line(kind: str, good_v21: Path, tmp_path: Path) -> None:
    break_it, named = malformed.V21_KINDS[kind]
    bad = shutil.copytree(good_v21, tmp_path / "bad")
    break_it(bad)
    line = refusal(bad)
    assert all(part in line for part in named), line


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(malformed.KINDS) >= 100


def test_good_datasets_pass(good: Path, good_v21: Path, tmp_path: Path) -> None:
    check_dataset(good)
    check_dataset(good_v21)
    check_dataset(malformed.to_v21(good, tmp_path / "png", pictures="image"))
    check_dataset(malformed.tiny_dataset(tmp_path / "blind", cameras=()))
    check_dataset(Path(shutil.copytree(good, tmp_path / ("long" * 40) / "name")))


def test_double_precision_is_no_fault(good: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    copy = shutil.copytree(good, tmp_path / "double")
    wide = malformed.column(malformed.ROWS, "action", lambda v: pa.array(v, pa.list_(pa.float64(), 4)))
    wide(copy)
    check_dataset(copy)


def test_thirty_thousand_rows_take_a_moment(tmp_path: Path) -> None:
    (out := tmp_path / "long").mkdir()
    episodes = (malformed.tiny_episode(i, 300, cameras=()) for i in range(100))
    write_episodes(episodes, malformed.tiny_schema(cameras=()), out)
    check_dataset(out)
    start = time.process_time()
    check_dataset(out)
    assert time.process_time() - start < 0.6  # 0.12 measured on an idle core


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_info_json_whatsoever_escapes_as_another_error(data: st.DataObject, good: Path) -> None:
    """One value anywhere in info.json replaced by any JSON: the gate passes it or says BadInput, in one line."""
    info = json.loads((good / "meta/info.json").read_text())
    spot = info
    while True:
        key = data.draw(st.sampled_from(sorted(spot)) if isinstance(spot, dict) else st.integers(0, len(spot) - 1))
        if not isinstance(spot[key], dict | list) or not spot[key] or data.draw(st.booleans()):
            break
        spot = spot[key]
    spot[key] = data.draw(JSON)
    text, path = json.dumps(info), good / "meta/info.json"
    before = path.read_text()
    try:
        path.write_text(text)
        check_dataset(good)
    except BadInput as error:
        assert len(str(error)) < 200 and str(error).isprintable()
    finally:
        path.write_text(before)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_damaged_file_escapes_as_another_error(data: st.DataObject, good: Path) -> None:
    """Bytes of any file changed, or its end cut off."""
    files = sorted(p for p in good.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    before = path.read_bytes()
    after = bytearray(before[: data.draw(st.integers(len(before) // 2, len(before)))])
    for _ in range(data.draw(st.integers(0, 4))):
        after[data.draw(st.integers(0, len(after) - 1))] = data.draw(st.integers(0, 255))
    try:
        path.write_bytes(after)
        check_dataset(good)
    except BadInput as error:
        assert len(str(error)) < 200 and str(error).isprintable()
    finally:
        path.write_bytes(before)


def test_a_playlist_is_not_followed_and_nothing_is_asked_of_a_network(good: Path) -> None:
    """The gate and the reader import neither LeRobot nor the Hub's client, which would fetch what is missing."""
    code = (
        "import sys, pathlib, data.validate; data.validate.check_dataset(pathlib.Path(sys.argv[1]));"
        "print([m for m in ('lerobot', 'huggingface_hub', 'torch', 'requests') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(good)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
