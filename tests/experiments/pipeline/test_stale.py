"""What is stale and why: DVC's account in words."""

from experiments.pipeline.graph import reasons


def test_every_kind_of_change_has_its_words() -> None:
    changes = [
        {"changed deps": {"params.yaml": {"probing.C": "modified"}, "src/a.py": "modified"}},
        {"changed outs": {"results/x.json": "deleted"}},
        "changed command",
    ]
    assert reasons(changes, set()) == [
        "parameter probing.C modified", "src/a.py modified", "its result results/x.json deleted", "its command changed",
    ]  # fmt: skip


def test_cached_outputs_that_are_merely_absent_make_nothing_stale() -> None:
    cached = {"data/residuals/m.safetensors"}
    changes = [
        {"changed deps": {"data/residuals/m.safetensors": "deleted"}},
        {"changed outs": {"data/residuals/m.safetensors": "not in cache"}},
    ]
    assert reasons(changes, cached) == []
    assert reasons([{"changed deps": {"data/residuals/m.safetensors": "modified"}}], cached) != []
