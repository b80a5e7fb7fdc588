"""The Hugging Face Hub: a model card beside exported weights, and both uploaded by huggingface_hub.

HF_ENDPOINT and HF_TOKEN mean what they mean to huggingface_hub.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that it uses: which one depends on its version
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from xlc_ray import files
from xlc_ray.config import Config, UserError, yaml_text
from xlc_ray.dictionary import Dictionary
from xlc_ray.export.names import model_name, public

CARD = "README.md"
METRICS = ("explained_variance", "fvu", "l0", "dead_features", "ce_recovered", "kl", "top1_agreement")
_FETCH = (
    'from huggingface_hub import snapshot_download\n{imports}\n\nfolder = snapshot_download("{{repo}}") + "{{inner}}"\n'
)
LOAD = {
    "circuit_tracer": "from circuit_tracer.utils.hf_utils import load_transcoder_from_hub\n\n"
    'transcoder, facts = load_transcoder_from_hub("{repo}")',
    "saelens": _FETCH.format(imports="from sae_lens import SAE") + "sae = SAE.load_from_disk(folder)",
    "dictionary_learning": _FETCH.format(imports="from dictionary_learning.utils import load_dictionary")
    + 'dictionary, facts = load_dictionary(folder, device="cpu")',
    "crosscoder": _FETCH.format(imports="import torch") + 'weights = torch.load(f"{{folder}}/cc_weights.pt")',
}
"""How to load what was pushed, with the repository and the folder in it that is meant."""
T = TypeVar("T")


def card(made: Dictionary, config: Config, form: str, metrics: dict[str, Any] | None, repo: str | None) -> str:
    """The model card: what it is, how to load it, what eval.json says, the settings without local paths."""
    model, wiring = model_name(config), made.wiring
    facts: dict[str, Any] = {
        "library_name": form,
        "tags": ["sparse-dictionary", config.dictionary.wiring.kind, "xlc_ray"],
    }
    if config.model.name == model and "/" in model:
        facts["base_model"] = model
    inner = f"/{wiring.reads[0][0]}" if wiring.groups > 1 else ""
    how = LOAD["crosscoder" if len(wiring.reads[0]) > 1 else form].format(repo=repo or "user/name", inner=inner)
    lines = [
        f"---\n{yaml_text.dump(facts)}---",
        f"# {config.dictionary.wiring.kind} of {model}",
        f"{wiring.groups} group(s) of {made.sizes[0]:,} features, gate {config.dictionary.gate.kind}, read "
        f"{', '.join(wiring.read_sites)} and write {', '.join(wiring.written_sites)}. Trained with xlc_ray, exported "
        f"as {form}; activations go in and come out in the model's own units. `golden.safetensors` holds inputs, "
        "features and outputs to check an implementation against.",
        f"## Loading\n\n```python\n{how}\n```\n\nor `xlc_ray.load(directory)`.",
    ]
    if metrics:
        known = [(name, metrics[name]) for name in METRICS if metrics.get(name) is not None]
        table = "\n".join(f"| `{name}` | {value:.4g} |" for name, value in known)
        lines.append(
            f"## Metrics\n\nOn {metrics['tokens']:,} held-out tokens.\n\n| metric | value |\n|---|---|\n{table}"
        )
    lines.append(f"## Settings\n\n```yaml\n{_settings(config)}```")
    return "\n\n".join(lines) + "\n"


def _settings(config: Config) -> str:
    tree = config.override(config.text.renamed(public)).model_dump(mode="json")
    tree["model"]["name"] = model_name(config)
    kept = ("seed", "model", "text", "generate", "dictionary", "train")
    tree["train"].pop("wandb", None)
    return yaml_text.dump({name: tree[name] for name in kept})


def check(repo: str) -> None:
    """Raise UserError unless this is a repository's name and the Hub knows the user who asks."""

    def ask(api: HfApi) -> None:
        validate_repo_id(repo)
        api.whoami()

    _ask(repo, ask)


def push(out: str, repo: str) -> str:
    """Upload a local directory to a model repository, made if it is not there; returns the commit's address."""

    def upload(api: HfApi) -> str:
        api.create_repo(repo, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=files.local(out), commit_message="Export from xlc_ray"))

    return _ask(repo, upload)


def _ask(repo: str, question: Callable[[HfApi], T]) -> T:
    where = f"--push-to-hub {repo}"
    try:
        return question(HfApi())
    except HFValidationError:
        raise UserError(f"{where}: not the name of a repository; write user/name") from None
    except OfflineModeIsEnabled:
        raise UserError(f"{where}: HF_HUB_OFFLINE is set; unset it to reach the Hub") from None
    except LocalTokenNotFoundError:
        raise UserError(f"{where}: needs a token; log in with `hf auth login` or set HF_TOKEN") from None
    except HfHubHTTPError as error:
        said = error.server_message or str(error).splitlines()[0]
        status = error.response.status_code if error.response is not None else "no status"
        raise UserError(f"{where}: the Hub answered {status}: {said}; check the name and HF_TOKEN's rights") from None
    except HTTPError as error:
        raise UserError(f"{where}: the Hub cannot be reached: {error}") from None
