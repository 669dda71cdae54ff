"""Placement: what auto means, what fits, and models that lie on several devices."""

from pathlib import Path

import pytest
import torch
from architectures import language_model

from classifier_emergence.errors import InputError
from classifier_emergence.models import placement
from classifier_emergence.models.loading import describe, load, open_model
from classifier_emergence.models.placement import Placement, check_fits, place
from classifier_emergence.reading.lens import check_lens, lens_scores
from classifier_emergence.reading.residuals import residual_stream

PROMPTS = ["7 * 8 =", "7 * 8 + 1 ="]
CPU = Placement("cpu", torch.float32)


@pytest.mark.parametrize(
    ("here", "device", "dtype", "expected"),
    [
        (["cpu"], "auto", "auto", CPU),
        (["cpu"], "balanced", "auto", Placement("balanced", torch.float32)),
        (["cuda:0", "cuda:1", "cpu"], "auto", "auto", Placement("cuda:0", torch.bfloat16)),
        (["cuda:0", "cuda:1", "cpu"], "cuda:1", "float16", Placement("cuda:1", torch.float16)),
        (["mps", "cpu"], "cpu", "auto", CPU),
        (["mps", "cpu"], "auto", "float32", Placement("mps", torch.float32)),
    ],
)
def test_auto_is_the_fastest_device_and_there_the_checkpoints_precision(
    here: list[str], device: str, dtype: str, expected: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "devices", lambda: here)
    assert place(device, dtype, "bfloat16") == expected
    assert place(device, "auto", "float32").dtype == torch.float32


def test_what_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(InputError, match=r"device 'cuda:7': torch sees .*cpu here"):
        place("cuda:7", "auto", None)
    with pytest.raises(InputError, match=r"dtype 'int4': choose auto, float32"):
        place("auto", "int4", None)


def test_too_little_memory_is_said_before_loading_with_what_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = {"cpu": 20_000_000_000, "balanced": 900_000_000_000}
    monkeypatch.setattr(placement, "free_memory", lambda device: rooms[device])
    check_fits("llama", 5_000_000_000, 0, CPU)
    message = (
        r"^llama: its weights need 32.0 GB in float32, and cpu has 20.0 GB free, short by 12.0 GB "
        r"\(--dtype bfloat16 needs 16.0 GB; --device balanced has 900.0 GB, including disk\)$"
    )
    with pytest.raises(InputError, match=message):
        check_fits("llama", 8_000_000_000, 0, CPU)
    monkeypatch.setitem(rooms, "balanced", 0)
    with pytest.raises(InputError, match="no option would do"):
        check_fits("huge", 8_000_000_000_000, 0, CPU)


def test_memory_is_what_the_system_and_the_container_leave(tmp_path: Path) -> None:
    info = tmp_path / "meminfo"
    assert placement._free_ram(info, tmp_path) is None
    info.write_text("MemTotal: 9000 kB\nMemAvailable: 5000 kB\n")
    assert placement._free_ram(info, tmp_path) == 5000 * 1024
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\nfile 500000\n")
    for limit, free in (("max", 5000 * 1024), ("4000000", 1_500_000), ("400000000", 5000 * 1024)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        assert placement._free_ram(info, tmp_path) == free


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt-projected", "gpt-oss"])
def test_weights_on_the_disk_give_the_same_states_and_lens(
    name: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = language_model(name)
    lm.model.save_pretrained(tmp_path / "small")
    lm.tokenizer.save_pretrained(tmp_path / "small")
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda *_: {"cpu": 60_000})
    away = load(str(tmp_path / "small"), {}, device="balanced", dtype=dtype)
    assert "disk" in describe(away)["device"]
    assert away.model.dtype == getattr(torch, dtype)
    states, expected = residual_stream(away, PROMPTS), residual_stream(lm, PROMPTS)
    rounding = {"float32": 1e-5, "bfloat16": 0.05}[dtype] * expected.abs().max()
    torch.testing.assert_close(states, expected, atol=float(rounding), rtol=0)
    readout = away.readout
    assert {states.dtype, readout.norm(states).dtype, readout.logits(states[0]).dtype} == {torch.float32}
    assert check_lens(away) < {"float32": 1e-5, "bfloat16": 0.02}[dtype]
    found, wanted = (lens_scores(states, one.readout, [[7], [8, 9]]) for one in (away, lm))
    close = {"float32": 1e-5, "bfloat16": 0.02}[dtype]
    torch.testing.assert_close(found.log_alignment, wanted.log_alignment, atol=close, rtol=0)


def test_attention_other_than_sdpa_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name, said in (("gemma2", True), ("llama", False)):
        lm = language_model(name)
        lm.model.save_pretrained(tmp_path / name)
        lm.tokenizer.save_pretrained(tmp_path / name)
        capfd.readouterr()
        open_model(str(tmp_path / name), device="cpu", dtype="bfloat16")
        assert capfd.readouterr().err == f"{name}: eager attention, as Gemma2ForCausalLM has no {SDPA}\n" * said


SDPA = "scaled_dot_product_attention"
