"""A saved model is a folder with config.json and model.safetensors, on this disk or on the Hugging Face hub."""

from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from spikegen.spec import Spec, UserError
from spikegen.storage import replacing, write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_model(folder: Path, state: Mapping[str, Tensor], saved: Spec) -> None:
    """Write `state` as model.safetensors and `saved` as config.json into `folder`, each beside and renamed."""
    with replacing(folder / WEIGHTS) as path:
        # not save_file, whose file its owner alone can read
        path.write_bytes(save({k: v.detach().cpu().contiguous() for k, v in state.items()}))
    write_json(folder / CONFIG, saved.model_dump(mode="json"))


def find_model(source: str | Path, revision: str | None = None) -> Path:
    """The folder `source`, else that of the Hugging Face hub's repository of this name; UserError if it is neither."""
    folder = Path(source)
    if not folder.is_dir():
        return _from_hub(str(source), revision)
    if not (folder / CONFIG).is_file():
        right = f"a run has config.yaml, a saved model {CONFIG}"
        inside = f"; did you mean {folder / 'model'}?" if (folder / "model" / CONFIG).is_file() else ""
        raise UserError(f"{folder} is no run and no saved model ({right}){inside}")
    return folder


def load_weights(model: nn.Module, weights: Path, config: Path) -> None:
    """Put the tensors of the file `weights` into `model`; `config` is the file that says what it was built as.

    UserError where the file is missing, broken, of another shape than the model, or holds what is not finite: a
    membrane of NaN never fires, and what comes of that is a score like any other.
    """
    try:
        state = load_file(weights)
        model.load_state_dict(state)
    except (SafetensorError, OSError) as error:
        raise UserError(f"cannot read {weights}: {error}; it is missing, truncated or no safetensors") from None
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip(" \t.")
        right = "use a folder as this version of spikegen saves it, or train anew"
        raise UserError(f"{weights} does not fit {config}: {first}; {right}") from None
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(f"{weights}: {broken[0]} has numbers that are not finite; the training diverged, train anew")


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wrong: Callable[[str], UserError] = lambda why: UserError(  # noqa: E731
        f"{repository} is no run folder, no saved model, and no model on the Hugging Face hub ({why})"
    )
    if Path(repository).is_file():
        raise UserError(f"{repository} is a file; a run or a saved model is a folder")
    if Path(repository).is_absolute() or repository.count("/") != 1:
        raise wrong("a hub id is OWNER/NAME")
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=[CONFIG, WEIGHTS]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise wrong(str(error).splitlines()[0]) from None
