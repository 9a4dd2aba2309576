"""llama.cpp from the source inside llama-cpp-python's sdist: its server, Q4_0 language model, F16 vision tower.

Its converter knows tokenizers by a hash of what they make of a text, and no CLIP tower of LLaVA's `-hf` form. So it is told
that the made-up tokenizer is Qwen2's, which it is built like, and the tower is written here, tensor by tensor, as `clip.cpp`
reads it (tools/mtmd/clip-impl.h has the names).
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from peer_workers.common import Answer, Clock, Job, Settings, call, main, peak_of

TITLE = "llama.cpp, Q4_0, F16 tower"
SDIST = "llama-cpp-python==0.3.36"
REQUIREMENTS = ("cmake", "ninja", "transformers==5.24.0", "sentencepiece", "protobuf", "pyyaml", "requests")
TARGETS = ("llama-server", "llama-quantize")


def home() -> Path:
    """Where the source lies unpacked, inside this environment."""
    return Path(sys.prefix) / "llama.cpp"


def install() -> None:
    """Fetches the source and builds it, for this processor."""
    source, tools = home(), Path(sys.executable).parent
    build = source / "build"
    if all((build / "bin" / target).exists() for target in TARGETS):
        return
    if not source.exists():
        with tempfile.TemporaryDirectory() as folder:
            call(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", folder, SDIST)
            with tarfile.open(next(Path(folder).glob("*.tar.gz"))) as archive:
                archive.extractall(folder, filter="data")
            shutil.move(next(Path(folder).glob("*/vendor/llama.cpp")), source)
    options = ("BUILD_SHARED_LIBS", "LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL")
    configure = [tools / "cmake", "-G", "Ninja", "-S", source, "-B", build, "-DCMAKE_BUILD_TYPE=Release", "-DGGML_NATIVE=ON"]
    path = f"{tools}:{os.environ['PATH']}"
    call(*configure, *(f"-D{option}=OFF" for option in options), PATH=path)
    call(tools / "cmake", "--build", build, "--target", *TARGETS, PATH=path)


def prepare(checkpoint: Path, decoder: Path, output: Path) -> None:
    output.mkdir()
    sys.path[:0] = [str(home()), str(home() / "gguf-py")]
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    qwen = config["model_type"] == "qwen2_vl"
    whole = output / "whole.gguf"
    _convert(checkpoint if qwen else decoder, whole)
    call(home() / "build/bin/llama-quantize", whole, output / "decoder.gguf", "Q4_0")
    whole.unlink()
    if qwen:
        _convert(checkpoint, output / "vision.gguf", "--mmproj")
    else:
        _write_clip(checkpoint, config, output / "vision.gguf")


def _convert(checkpoint: Path, output: Path, *options: str) -> None:
    code = (
        "import sys, runpy; from conversion.base import TextModel; "
        "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'qwen2'; sys.argv[0] = 'convert_hf_to_gguf.py'; "
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    script, paths = home() / "convert_hf_to_gguf.py", os.pathsep.join(sys.path[:2])
    call(sys.executable, "-c", code, script, checkpoint, "--outfile", output, "--outtype", "f16", *options, PYTHONPATH=paths)


def _write_clip(checkpoint: Path, config: dict[str, Any], output: Path) -> None:
    import gguf
    import numpy as np
    import torch
    from safetensors import safe_open

    vision = config["vision_config"]
    writer = gguf.GGUFWriter(output, "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", False)  # the quick form
    writer.add_uint32("clip.vision.image_size", vision["image_size"])
    writer.add_uint32("clip.vision.patch_size", vision["patch_size"])
    writer.add_uint32("clip.vision.embedding_length", vision["hidden_size"])
    writer.add_uint32("clip.vision.feed_forward_length", vision["intermediate_size"])
    writer.add_uint32("clip.vision.projection_dim", vision["projection_dim"])
    writer.add_uint32("clip.vision.block_count", vision["num_hidden_layers"] - 1)  # the last one's output is not read
    writer.add_uint32("clip.vision.attention.head_count", vision["num_attention_heads"])
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision["layer_norm_eps"])
    writer.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    writer.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])
    writer.add_array("clip.vision.feature_layer", [vision["num_hidden_layers"] - 1])
    names = {
        "embeddings.class_embedding": "v.class_embd", "embeddings.patch_embedding": "v.patch_embd",
        "embeddings.position_embedding": "v.position_embd", "pre_layrnorm": "v.pre_ln",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.out_proj": "attn_out", "layer_norm1": "ln1", "layer_norm2": "ln2", "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down", "linear_1": "mm.0", "linear_2": "mm.2",
    }  # fmt: skip
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dictionary
                layer = re.search(r"vision_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$", key) or re.search(
                    r"vision_tower\..*layers\.(\d+)\.(.+)\.(weight|bias)$", key
                )
                other = re.search(r"(?:vision_tower|multi_modal_projector).*?(\w+\.\w+|\w+)\.(weight|bias)$", key)
                if "class_embedding" in key:
                    name = names["embeddings.class_embedding"]
                elif layer:
                    if int(layer[1]) >= vision["num_hidden_layers"] - 1:
                        continue
                    name = f"v.blk.{layer[1]}.{names[layer[2]]}.{layer[3]}"
                elif other and (found := [new for old, new in names.items() if key.endswith(f"{old}.{other[2]}")]):
                    name = f"{found[0]}.{other[2]}"
                else:
                    continue
                tensor = tensors.get_tensor(key).to(torch.float32).numpy()
                kept = tensor.ndim < 2 or "position" in name
                writer.add_tensor(name, tensor if kept else tensor.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    sees = True

    def __init__(self, settings: Settings) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder, threads = Path(settings.folder), str(settings.threads)
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the server
        command = [home() / "build/bin/llama-server", "-m", folder / "decoder.gguf", "--mmproj", folder / "vision.gguf"]
        command += ["-t", threads, "-tb", threads, "-c", str(settings.capacity), "-np", "1", "--host", "127.0.0.1"]
        self.server = subprocess.Popen([*command, "--port", str(port)], stdout=self.log, stderr=self.log)
        self.url = f"http://127.0.0.1:{port}"
        self.versions = {"llama-cpp-python (its llama.cpp)": SDIST.split("==")[1]}
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/health").read()
                break
            except (urllib.error.URLError, ConnectionError):
                if self.server.poll() is not None:
                    raise RuntimeError(self._logged()[-2_000:]) from None
                time.sleep(0.01)
        self.mark = json.loads(urllib.request.urlopen(f"{self.url}/props").read())["media_marker"]

    def _logged(self) -> str:
        self.log.seek(0)
        return self.log.read().decode(errors="replace")

    def ask(self, job: Job) -> Answer:
        clock = Clock()
        prompt: Any = job.prompt
        if job.picture:
            data = base64.b64encode(Path(job.picture).read_bytes()).decode()
            prompt = {"prompt_string": f"{job.before}{self.mark}{job.after}", "multimodal_data": [data]}
        body = {
            "prompt": prompt, "n_predict": job.new_tokens, "ignore_eos": True, "temperature": 0, "stream": True,
            "cache_prompt": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"{self.url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        last: dict[str, Any] = {}
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")) from None
        with answer:
            for line in answer:
                if line.startswith(b"data: "):
                    last = json.loads(line[6:])
                    if not last.get("stop"):
                        clock.tick()
        if not clock.times:
            clock.tick()
        times = last["timings"]
        return Answer(
            first_token=clock.first, tokens_per_second=times["predicted_per_second"] if job.new_tokens > 1 else None,
            prompt_tokens=times["prompt_n"] + times.get("cache_n", 0), tokens=times["predicted_n"],
        )  # fmt: skip

    def peak(self) -> int:
        return peak_of(self.server.pid)

    def close(self) -> None:
        self.server.terminate()
        self.server.wait()
        self.log.close()


if __name__ == "__main__":
    main(prepare, LlamaCpp, install)
