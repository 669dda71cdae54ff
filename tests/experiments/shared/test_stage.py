from hashlib import sha256
from pathlib import Path

import pytest

from classifier_emergence.errors import InputError
from classifier_emergence.models.registry import HubSource, PathSource
from classifier_emergence.results import write_result
from experiments.shared.stage import check_weights


@pytest.mark.parametrize("path", ["weights", "weights/model.gguf"])
def test_local_weights_are_those_that_stage_fetch_has_seen(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("weights").mkdir()
    file = Path(path) if Path(path).suffix else Path(path, "model.safetensors")
    source = PathSource(source="path", path=path)
    file.write_bytes(b"weights")
    check_weights("m", source)  # nothing is known of them
    write_result("results/fetch/m.json", {"source": {"sha256": {file.name: sha256(b"weights").hexdigest()}}})
    check_weights("m", source)
    file.write_bytes(b"weightr")
    with pytest.raises(InputError, match=rf"registry\.m: the weights in {path} are not those of .*fetch@m"):
        check_weights("m", source)
    check_weights("m", HubSource(source="hub", repo="a/b", revision="0" * 40, licence="MIT"))
