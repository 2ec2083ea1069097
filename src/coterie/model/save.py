"""Write a base model as a Hugging Face directory, which Coterie, transformers and other engines load as it is.

Notable: written aside and put in place by one rename, so a folder is whole or not there.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from coterie.errors import CoterieError, StorageError
from coterie.model.hf import to_hf
from coterie.model.load import BaseModel


def save_model(base: BaseModel, folder: Path) -> None:
    """Write config.json, model.safetensors, tokenizer and chat template of `base` into the new `folder`.

    Raises CoterieError where the folder is there already, ModelError where no layout holds the model, StorageError
    where the disk is full.
    """
    if folder.exists():
        raise CoterieError(f"{folder}: already there; name a new folder")
    facts, weights = to_hf(base.decoder.config, base.decoder.weights)
    facts["eos_token_id"] = sorted(base.eos)
    facts["bos_token_id"] = base.tokenizer.token_to_id(base.bos_token) if base.bos_token else None
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": base.decoder.config.context}
    settings |= {k: v for k, v in (("bos_token", base.bos_token), ("eos_token", base.eos_token)) if v}
    scratch = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".save-"))
        # Views of one fused matrix would count as shared; a copy of each on the way out costs one tensor at a time.
        save_file({k: v.detach().clone().contiguous() for k, v in weights.items()}, scratch / "model.safetensors",
                  {"format": "pt"})  # fmt: skip
        base.tokenizer.save(str(scratch / "tokenizer.json"))
        (scratch / "chat_template.jinja").write_text(base.template)
        for name, value in (("config.json", facts), ("tokenizer_config.json", settings),
                            ("generation_config.json", _ends(facts))):  # fmt: skip
            (scratch / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        for file in scratch.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        scratch.chmod(0o755)
        os.rename(scratch, folder)
    except CoterieError:
        raise
    except Exception as error:  # safetensors and tokenizers raise their own kinds for a full disk
        raise StorageError(f"{folder}: the model cannot be written: {error}") from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def _ends(facts: dict[str, Any]) -> dict[str, Any]:
    return {k: facts[k] for k in ("bos_token_id", "eos_token_id") if facts[k] is not None}
