"""Every error that EdgeVLM raises on purpose.

    EdgeVLMError                      all of them; the command line prints the text and exits with 2
    ├── CheckpointError               the Hugging Face side
    │   ├── CheckpointNotFoundError   nothing there, or no network to fetch it
    │   ├── UnsupportedModelError     an architecture or option that no family here covers
    │   └── WeightsError              missing, truncated, pickled or wrongly shaped weights
    ├── ExportError                   the graph that came out is not what was declared
    ├── RecipeError                   a quantization recipe that cannot be read or applied
    ├── CalibrationError              a calibration set that cannot be used
    ├── BundleError                   the bundle on disk
    │   ├── ManifestError             edgevlm.json is unreadable, inconsistent or of a newer schema
    │   └── IntegrityError            a file is missing, changed, or lies outside the bundle
    ├── EngineError                   a TensorRT engine that cannot be built, or is not what was asked for
    ├── DeviceError                   the GPU failed, or its memory is full
    ├── InputError                    what the caller asked for
    │   ├── ImageError                no picture, too large, too thin
    │   ├── PromptError               places and pictures do not match, a template that fails
    │   └── CapacityError             longer than the KV cache
    ├── OutputError                   the output folder exists, the disk is full
    ├── ClusterError                  the Ray cluster: none there, too small, or its workers fail
    └── MissingDependencyError        a package is not installed; names the extra that has it

Each text says what was asked, what exists, and what to do. Foreign exceptions are mapped where they enter, with
`raise … from exc`, so `--debug` shows them.
"""

from __future__ import annotations

__all__ = [
    "BundleError",
    "CalibrationError",
    "CapacityError",
    "CheckpointError",
    "CheckpointNotFoundError",
    "ClusterError",
    "DeviceError",
    "EdgeVLMError",
    "EngineError",
    "ExportError",
    "ImageError",
    "InputError",
    "IntegrityError",
    "ManifestError",
    "MissingDependencyError",
    "OutputError",
    "PromptError",
    "RecipeError",
    "UnsupportedModelError",
    "WeightsError",
]


class EdgeVLMError(Exception):
    """Base of all errors raised on purpose."""


class CheckpointError(EdgeVLMError):
    """The Hugging Face checkpoint cannot be used."""


class CheckpointNotFoundError(CheckpointError):
    """No checkpoint under that name, folder or alias."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is fine, but no family covers it."""


class WeightsError(CheckpointError):
    """Weights are missing, truncated, pickled, or of another shape than the configuration says."""


class ExportError(EdgeVLMError):
    """The exported graph is not what was declared."""


class RecipeError(EdgeVLMError):
    """A quantization recipe cannot be read or applied."""


class CalibrationError(EdgeVLMError):
    """A calibration set cannot be used."""


class BundleError(EdgeVLMError):
    """The bundle cannot be used."""


class ManifestError(BundleError):
    """`edgevlm.json` is unreadable, inconsistent, or of a newer schema."""


class IntegrityError(BundleError):
    """A file of the bundle is missing, changed, or lies outside of it."""


class EngineError(EdgeVLMError):
    """A TensorRT engine cannot be built, or is not what was asked for."""


class DeviceError(EdgeVLMError):
    """The GPU failed. `lost`: nothing works on it any more, and the model has to be loaded again; else its memory is full, and
    the next call may well go through."""

    def __init__(self, text: str, *, lost: bool = False) -> None:
        super().__init__(text)
        self.lost = lost

    def within(self, part: str) -> DeviceError:
        """The same failure, saying in which part."""
        said = str(self)
        return self if "the part " in said else DeviceError(f"In the part {part}: {said}", lost=self.lost)


class InputError(EdgeVLMError):
    """The request cannot be served as it stands."""


class ImageError(InputError):
    """A picture that is none, or that cannot be taken."""


class PromptError(InputError):
    """Prompt, pictures and chat template do not fit together."""


class CapacityError(InputError):
    """The request needs more places than the KV cache has."""


class OutputError(EdgeVLMError):
    """The result cannot be written."""


class ClusterError(EdgeVLMError):
    """The machines that share the work cannot be used, or fail at it."""


class MissingDependencyError(EdgeVLMError):
    """A package is not installed; the text names the extra that has it."""
