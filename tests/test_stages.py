"""Stages: what makes one stale, what does not, and that it is said why."""

import pytest

from data.store import Build, Store
from tasks import stages
from tasks.code import code_digests
from tasks.stages import STAGES, Session, Stage, Work, ensure, session


def make_toy(build: Build, work: Work) -> None:
    text = "".join(p.digest for p in work.upstream("first"))
    (build.out / "value").write_text(f"{work.params['x']} {text}")


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setenv("FLYWHEEL_ROOT", str(tmp_path))
    body = f"{__name__}:make_toy"
    rows = {name: Stage(body=body, upstream=(), libraries=(), about="toy") for name in ("first", "second", "third")}
    monkeypatch.setattr(stages, "STAGES", rows)

    def line(a: int, b: int, **options) -> Session:
        with session(Session(**options)) as current:
            first = ensure("first", {"x": a})
            second = ensure("second", {"x": b}, [first])
            ensure("third", {"x": 0}, [second])
        return current

    return line


def ran(current: Session) -> list[str]:
    return [o.stage for o in current.outcomes if not o.cached]


def test_a_second_run_does_nothing(toy):
    assert ran(toy(1, 1)) == ["first", "second", "third"]
    assert ran(toy(1, 1)) == []


def test_a_changed_parameter_reruns_its_stage_and_what_follows(toy):
    toy(1, 1)
    again = toy(1, 2)
    assert ran(again) == ["second", "third"]
    assert again.outcomes[1].why == "x 1 -> 2"
    assert "input second 0 changed" in again.outcomes[2].why


def test_explain_runs_nothing_and_tells_what_would_follow(toy):
    toy(1, 1)
    told = toy(1, 2, dry=True)
    assert [(o.stage, o.cached) for o in told.outcomes] == [("first", True), ("second", False), ("third", False)]
    assert told.outcomes[1].why == "x 1 -> 2"
    assert told.outcomes[2].why == "upstream second will be made anew"
    assert ran(toy(1, 2)) == ["second", "third"]  # so nothing had been made


def test_force_reruns_that_stage_only_when_its_answer_is_the_same(toy):
    toy(1, 1)
    assert ran(toy(1, 1, force=frozenset({"second"}))) == ["second"]


def test_damage_reruns_only_what_is_damaged(toy):
    first = toy(1, 1).outcomes[0].ref
    file = first.dir / "value"
    file.chmod(0o644)
    file.write_text("???")
    again = toy(1, 1)
    assert ran(again) == ["first"] and again.outcomes[0].why.startswith("damaged")
    assert Store().find("first", first.key)[0] == first


def test_every_row_of_the_table_names_a_body_that_is_there():
    from data.registry import Registry

    bodies = Registry("stage", {name: row.body for name, row in STAGES.items()})
    for name, row in STAGES.items():
        assert callable(bodies.resolve(name))
        assert set(row.upstream) <= set(STAGES)


def test_code_digest_follows_imports_and_ignores_comments(tmp_path, monkeypatch):
    import sys

    from tasks import code

    package = tmp_path / "toypkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.py").write_text('"""Doc."""\nfrom toypkg import b\n\n\ndef f():\n    """Doc."""\n    return b.X\n')
    (package / "b.py").write_text("X = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(code, "OURS", ("toypkg",))

    def digests() -> dict[str, str]:
        for cached in (code._source, code._tree, code._digest, code._imports):
            cached.cache_clear()
        return code_digests(("toypkg.a",), ("numpy",))

    before = digests()
    assert set(before) == {"toypkg", "toypkg.a", "toypkg.b", "numpy"}
    (package / "a.py").write_text('"""Other."""\nfrom toypkg import b  # why\n\n\ndef f():\n    return b.X\n')
    assert digests() == before
    (package / "b.py").write_text("X = 2\n")
    after = digests()
    assert after["toypkg.a"] == before["toypkg.a"] and after["toypkg.b"] != before["toypkg.b"]
    sys.modules.pop("toypkg", None)
