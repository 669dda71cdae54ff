"""What is told on standard error, and what is not."""

import sys

import huggingface_hub.utils
import pytest
from tqdm.auto import tqdm

from classifier_emergence.progress import no_bars_in_logs, notice


def test_bars_of_libraries_stay_out_of_logs_and_what_they_say_does_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with no_bars_in_logs():
        assert list(tqdm(range(2))) == list(huggingface_hub.utils.tqdm(range(2))) == [0, 1]
        sys.stderr.write("a warning\n")
    assert capsys.readouterr().err == "a warning\n"
    list(tqdm(range(2), file=sys.stderr))
    assert "2/2" in capsys.readouterr().err


def test_a_notice_is_one_line_that_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    notice("[bold]a\x1b[31m\nb")
    assert capsys.readouterr().err == "[bold]a\\u{1b}[31m\\u{a}b\n"
