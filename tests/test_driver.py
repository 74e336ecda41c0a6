"""The private Vulkan driver: sources rewritten from the machine's own, libraries found by path, nothing half-made."""

import json
import os
import shutil
import subprocess

import pytest

from data.errors import BadInput
from data.sim import apt, driver

STANZA = """Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
"""


def write_sources(etc, **files):
    (etc / "sources.list.d").mkdir(parents=True)
    for name, text in files.items():
        (etc / "sources.list.d" / name.replace("_", ".")).write_text(text)
    return etc


def test_an_old_release_gets_its_backports_from_the_same_address(tmp_path):
    etc = write_sources(tmp_path, debian_sources=STANZA, other_sources=STANZA.replace("bookworm", "nodistro"))
    (text,) = apt.sources_of(etc, "bookworm").values()
    assert "Suites: bookworm bookworm-updates bookworm-backports" in text
    assert "URIs: http://mirror.example/debian" in text


def test_a_newer_release_is_taken_as_it_is(tmp_path):
    etc = write_sources(tmp_path, ubuntu_sources=STANZA.replace("bookworm", "noble"))
    (text,) = apt.sources_of(etc, "noble").values()
    assert "Suites: noble noble-updates\n" in text


def test_one_line_sources_get_a_twin_for_the_backports(tmp_path):
    line = "deb [signed-by=/a/key.gpg] http://mirror.example/debian bookworm main contrib"
    etc = write_sources(tmp_path, debian_list=f"# a comment\n{line}\ndeb http://other.example stretch main\n")
    (text,) = apt.sources_of(etc, "bookworm").values()
    assert text.splitlines() == [line, line.replace(" bookworm ", " bookworm-backports ")]


def test_no_source_for_this_release_is_said_in_one_line(tmp_path):
    etc = write_sources(tmp_path, debian_sources=STANZA + "Enabled: no\n")
    with pytest.raises(BadInput, match="no apt source for release 'bookworm'"):
        apt.sources_of(etc, "bookworm")


def test_without_apt_the_remedy_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda tool: None)
    with pytest.raises(BadInput, match="install Mesa >= 24"):
        driver.install_driver()
    assert not driver.driver_dir().exists()


def test_a_failed_download_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("apt-get", "apt-cache", "dpkg"):
        (tools / tool).write_text("#!/bin/sh\necho 'E: Unable to fetch some archives' >&2\nexit 100\n")
        (tools / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setattr(apt, "sources_of", lambda etc, release: {"debian.sources": STANZA})
    with pytest.raises(BadInput, match="Unable to fetch some archives"):
        driver.install_driver(log=lambda line: None)
    assert not list((tmp_path / ".flywheel").glob("vulkan*/"))


def test_an_installation_replaces_a_broken_one_and_clears_what_a_kill_left(monkeypatch, tmp_path):
    def unpacked(work):
        (work / "vulkan").mkdir()
        (work / "vulkan" / "icd.json").touch()
        return work / "vulkan"

    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(driver, "_unpacked", unpacked)
    (tmp_path / ".flywheel" / "vulkan-killed").mkdir(parents=True)
    driver.driver_dir().mkdir()
    (driver.driver_dir() / "broken").touch()
    assert driver.install_driver(log=lambda line: None) == driver.driver_dir()
    assert [path.name for path in driver.driver_dir().iterdir()] == ["icd.json"]
    assert not list((tmp_path / ".flywheel").glob("vulkan-*"))


@pytest.fixture
def private(monkeypatch, tmp_path):
    """A private driver folder with nothing to preload, and no driver chosen."""
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    for name in ("VK_ICD_FILENAMES", "VK_DRIVER_FILES"):
        monkeypatch.setenv(name, "")  # so that what the code sets is undone afterwards
        monkeypatch.delenv(name)
    folder = driver.driver_dir()
    folder.mkdir(parents=True)
    (folder / "icd.json").write_text("{}")
    (folder / "preload.json").write_text("[]")
    monkeypatch.setattr(driver, "_has_nvidia_vulkan", lambda: False)
    return folder


def test_the_private_driver_is_chosen_unless_someone_chose_before(private, monkeypatch):
    driver.ensure_driver()
    assert os.environ["VK_ICD_FILENAMES"] == str(private / "icd.json")
    monkeypatch.setenv("VK_ICD_FILENAMES", "/their/own.json")
    driver.ensure_driver("cpu")
    assert os.environ["VK_ICD_FILENAMES"] == "/their/own.json"


@pytest.mark.parametrize(
    ("device", "gpu", "private_used"), [("cuda:0", True, False), ("auto", True, False), ("cpu", True, True)]
)
def test_a_gpu_is_left_alone_unless_the_cpu_is_asked_for(private, monkeypatch, device, gpu, private_used):
    monkeypatch.setattr(driver, "_has_nvidia_vulkan", lambda: gpu)
    driver.ensure_driver(device)
    assert ("VK_ICD_FILENAMES" in os.environ) is private_used
    monkeypatch.delenv("VK_ICD_FILENAMES", raising=False)


def test_preloading_waits_for_what_a_library_needs(tmp_path):
    if not shutil.which("cc"):
        pytest.skip("needs a C compiler")
    (tmp_path / "a.c").write_text("int a(void) { return 1; }")
    (tmp_path / "b.c").write_text("int a(void); int b(void) { return a(); }")
    build = ["cc", "-shared", "-fPIC", f"-L{tmp_path}"]
    subprocess.run([*build, "-Wl,-soname,libpreload_a.so", "-o", "libpreload_a.so", "a.c"], cwd=tmp_path, check=True)
    subprocess.run([*build, "-o", "libpreload_b.so", "b.c", "-lpreload_a"], cwd=tmp_path, check=True)
    (tmp_path / "preload.json").write_text(json.dumps(["libpreload_b.so", "libpreload_a.so"]))  # the wrong order
    driver._preload(tmp_path)


def test_a_damaged_private_library_is_named(tmp_path):
    (tmp_path / "libx.so").write_text("not a library")
    (tmp_path / "preload.json").write_text('["libx.so"]')
    with pytest.raises(BadInput, match="delete that folder"):
        driver._preload(tmp_path)
