from hashlib import sha256
from pathlib import Path

import pytest

from classifier_emergence.errors import InputError
from classifier_emergence.models.registry import HubSource, PathSource
from classifier_emergence.results import write_result
from experiments.shared.stage import check_weights


def test_a_local_folder_has_the_weights_that_stage_fetch_has_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    file, source = Path("weights/model.safetensors"), PathSource(source="path", path="weights")
    file.write_bytes(b"weights")
    check_weights("m", source)  # nothing is known of them
    write_result("results/fetch/m.json", {"source": {"sha256": {file.name: sha256(b"weights").hexdigest()}}})
    check_weights("m", source)
    file.write_bytes(b"weightr")
    with pytest.raises(InputError, match=r"registry\.m: the weights in weights are not those of .*fetch@m"):
        check_weights("m", source)
    check_weights("m", HubSource(source="hub", repo="a/b", revision="0" * 40, licence="MIT"))
