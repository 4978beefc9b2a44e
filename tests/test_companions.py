"""Vision-language checkpoints: a text model, its mmproj, and what is left out."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ewq_gguf import api, store
from ewq_gguf.api import Made, Options, make_gguf
from ewq_gguf.checkpoint.gguf_file import read_gguf
from ewq_gguf.errors import InputError, UsageError, VerificationError
from ewq_gguf.llamacpp.companion import (
    CompanionLayout,
    companion_layout,
    make_companion,
    verify_companion,
)
from ewq_gguf.records import UniformPolicy
from ewq_gguf.report.companion_view import companion_line
from ewq_gguf.stages.companions import plan_companions
from ewq_gguf.stages.placing import place_companion
from tests import vision
from tests.checkpoints import write_llama
from tests.gguf_files import leftovers, using_cache

pytest_plugins = ["tests.toolchain_fixtures"]
pytestmark = [
    pytest.mark.llamacpp,
    pytest.mark.slow,
    pytest.mark.usefixtures("own_cache"),
]

POLICY = UniformPolicy(ggml_type="Q8_0")
N_GEMMA = 39  # tensors of the tower and its projector


class Notes(api.Silent):
    """Progress that keeps what it was told."""

    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Plans are written where the command runs."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory, session_cache) -> tuple[Path, Made, list[str]]:
    """Gemma 3 with a vision tower, what was made of it, and what was said."""
    root = tmp_path_factory.mktemp("gemma")
    model, notes = vision.write_gemma3(root / "tiny-vlm"), Notes()
    with using_cache(session_cache), pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        made = make_gguf(str(model), root / "out.gguf", POLICY, progress=notes)
    return model, made, notes.texts


@pytest.fixture(scope="module")
def gemma_layout(gemma, session_cache, toolchain) -> CompanionLayout:
    """Of its mmproj."""
    with using_cache(session_cache):
        checkpoint = api.open_model(str(gemma[0])).checkpoint
        return companion_layout(checkpoint, toolchain, "mmproj", "BF16")


def left_out(model: Path, layout=None, **options) -> list[str]:
    """What is said of a checkpoint whose images go nowhere."""
    run, notes = api.Run(str(model), Options(**options)), Notes()
    layout = layout or run.layout
    run.progress = notes
    assert plan_companions(run, layout) == []
    return notes.texts


def write_bmp(path: Path, side: int = 40) -> None:
    """A picture of a ramp, as BMP of 24 bits."""
    row = bytes(value for x in range(side) for value in (x * 6, 128, 255 - x * 6))
    pixels = row.ljust(-(-len(row) // 4) * 4, b"\0") * side
    head = struct.pack(
        "<IiiHHIIiiII", 40, side, side, 1, 24, 0, len(pixels), 0, 0, 0, 0
    )
    size = 14 + len(head) + len(pixels)
    path.write_bytes(b"BM" + struct.pack("<IHHI", size, 0, 0, 54) + head + pixels)


# What is made.


def test_a_vision_language_checkpoint_gives_a_text_model_and_its_mmproj(gemma):
    _, made, notes = gemma
    (beside,) = made.companions

    assert beside.path.name == "mmproj-tiny-vlm-BF16.gguf"
    assert beside.path.parent == made.path.parent
    assert (beside.companion.content, beside.companion.media) == ("mmproj", ("vision",))
    assert beside.companion.n_sources == beside.companion.n_tensors == N_GEMMA
    assert any(
        text.startswith(f"{N_GEMMA} tensors for images (76.42 kB") for text in notes
    )
    assert "76.42 kB -> " in companion_line(beside.path, beside.companion)


def test_an_mmproj_is_loaded_and_shown_an_image(gemma):
    found = gemma[1].companions[0].companion

    assert found.is_loaded
    assert found.embedded == 1  # 2 x 2 patches are pooled
    assert found.answer is not None


def test_llama_cpps_own_tool_takes_the_two_files(gemma, toolchain, tmp_path):
    tool = toolchain.bin_dir / "llama-mtmd-cli"
    if not tool.is_file():
        pytest.skip("llama-mtmd-cli is not built")
    _, made, _ = gemma
    write_bmp(tmp_path / "ramp.bmp")

    run = subprocess.run(
        [tool, "-m", made.path, "--mmproj", made.companions[0].path]
        + ["--image", tmp_path / "ramp.bmp", "-p", "what?", "-n", "2", "--temp", "0"]
        + ["--chat-template", "vicuna"],
        capture_output=True,
        timeout=60,
    )

    assert run.returncode == 0, run.stderr[-2000:]


def test_an_mmproj_holds_the_checkpoints_own_values(gemma):
    """Read by gguf and safetensors: nothing of ours is asked."""
    from gguf import GGUFReader
    from safetensors.torch import load_file

    model, made, _ = gemma
    source = load_file(model / "model.safetensors")
    stored = {t.name: t for t in GGUFReader(made.companions[0].path).tensors}
    tower = "vision_tower.vision_model."
    query = stored["v.blk.1.attn_q.weight"].data.view(np.uint16).astype(np.uint32)

    np.testing.assert_array_equal(
        (query << 16).view(np.float32).reshape(32, 32),
        source[f"{tower}encoder.layers.1.self_attn.q_proj.weight"].float().numpy(),
    )
    np.testing.assert_array_equal(
        stored["v.patch_embd.bias"].data,
        source[f"{tower}embeddings.patch_embedding.bias"].float().numpy(),
    )
    # Gemma's norms are kept less 1: the one tensor that the converter computes.
    assert made.companions[0].companion.computed == ("mm.soft_emb_norm.weight",)
    np.testing.assert_array_equal(
        stored["mm.soft_emb_norm.weight"].data,
        source["multi_modal_projector.mm_soft_emb_norm.weight"].float().numpy() + 1,
    )


def test_a_second_run_uses_the_mmproj_again_and_force_makes_the_same_bytes(gemma):
    model, made, _ = gemma
    path = made.companions[0].path
    before = path.stat().st_ino

    again = make_gguf(str(model), made.path, POLICY)
    assert again.companions[0].is_reused
    assert path.stat().st_ino == before

    forced = make_gguf(str(model), made.path, POLICY, options=Options(force=True))
    assert not forced.companions[0].is_reused
    assert path.stat().st_ino != before
    assert forced.companions[0].companion == made.companions[0].companion
    assert leftovers(path.parent) == []


def test_another_file_under_the_mmprojs_name_is_not_lost(
    gemma, gemma_layout, toolchain, tmp_path
):
    text, other = tmp_path / "out.gguf", tmp_path / "mmproj-tiny-vlm-BF16.gguf"
    text.write_bytes(b"")
    other.write_bytes(b"somebody's")

    with pytest.raises(UsageError, match="exists and is not this checkpoint's mmproj"):
        place_companion(api.Run(str(gemma[0]), Options(load=False)), gemma_layout, text)
    assert other.read_bytes() == b"somebody's"


def test_another_file_under_the_mmprojs_name_is_found_before_any_work(
    gemma, toolchain, tmp_path, monkeypatch
):
    (tmp_path / "mmproj-tiny-vlm-BF16.gguf").write_bytes(b"somebody's")

    def work(*_, **__):
        raise AssertionError("a file is made")

    monkeypatch.setattr("ewq_gguf.pipeline.making.base_file", work)
    monkeypatch.setattr("ewq_gguf.stages.converting.convert", work)

    why = "exists and is not this checkpoint's mmproj"
    for out in (tmp_path / "out.gguf", None):
        with pytest.raises(UsageError, match=why):
            make_gguf(str(gemma[0]), out, POLICY)
    with pytest.raises(UsageError, match=why):
        api.convert_model(api.Run(str(gemma[0])), tmp_path / "out.gguf", "BF16")
    assert leftovers(tmp_path) == []


def damaged(path: Path, name: str, out: Path) -> Path:
    """A copy with one bit of a value, or of a block's scale, turned over."""
    (tensor,) = [t for t in read_gguf(path).tensors if t.name == name]
    data = bytearray(path.read_bytes())
    data[tensor.offset + 1] ^= 0x08
    out.write_bytes(data)
    return out


def test_a_value_that_is_not_the_checkpoints_is_found(gemma, gemma_layout, tmp_path):
    name = "v.blk.0.attn_q.weight"
    path = damaged(gemma[1].companions[0].path, name, tmp_path / "m.gguf")

    with pytest.raises(VerificationError, match=f"{name} .*off by"):
        verify_companion(
            api.open_model(str(gemma[0])).checkpoint,
            gemma_layout,
            path,
            text_model=None,
        )


def test_quantised_values_are_compared_within_what_a_block_can_hold(
    gemma, toolchain, tmp_path
):
    checkpoint, name = api.open_model(str(gemma[0])).checkpoint, "v.blk.1.ffn_up.weight"
    layout = companion_layout(checkpoint, toolchain, "mmproj", "Q8_0")
    path = tmp_path / "q.gguf"

    found = make_companion(checkpoint, toolchain, layout, path, text_model=None)

    assert {t.name: t.ggml_type for t in read_gguf(path).tensors}[name] == "Q8_0"
    assert found.n_equal == N_GEMMA - 1
    assert not found.is_loaded
    with pytest.raises(VerificationError, match=f"{name} .*off by"):
        verify_companion(
            checkpoint,
            layout,
            damaged(path, name, tmp_path / "d.gguf"),
            text_model=None,
        )


def test_a_header_that_is_another_checkpoints_is_found(gemma, gemma_layout, tmp_path):
    path = tmp_path / "m.gguf"
    data = gemma[1].companions[0].path.read_bytes()
    path.write_bytes(data.replace(b"tiny-vlm", b"tiny-vln").replace(b"Tiny", b"Tino"))

    with pytest.raises(VerificationError, match="header is not the one"):
        verify_companion(
            api.open_model(str(gemma[0])).checkpoint,
            gemma_layout,
            path,
            text_model=None,
        )


def test_weights_that_are_split_and_unrolled_are_compared_as_well(toolchain, tmp_path):
    """Qwen2.5-VL: one qkv makes three tensors, one 3-D convolution two."""
    model = vision.write_qwen25vl(tmp_path / "qwen")
    _, (beside,) = api.convert_model(api.Run(str(model)), tmp_path / "q.gguf", "BF16")

    assert (beside.companion.n_sources, beside.companion.n_tensors) == (42, 55)
    assert beside.companion.n_equal == 55
    assert beside.companion.embedded == 9


def test_a_model_that_names_its_text_models_architecture_apart_is_taken(
    toolchain, tmp_path
):
    model = vision.write_smolvlm(tmp_path / "smol")
    run = api.Run(str(model), Options(mmproj="f16"))

    (layout,) = plan_companions(run, run.layout)

    assert layout.ggml_type == "F16"
    assert len(layout.hf_names) == 38
    assert layout.computed == frozenset()


# What is left out.


def test_images_are_left_out_where_the_processors_file_is_missing(
    gemma, toolchain, tmp_path
):
    model = vision.write_gemma3(tmp_path / "m", processor=False)
    same_text = api.open_model(str(gemma[0])).layout

    (said,) = left_out(model, same_text)

    assert f"{N_GEMMA} tensors for images (76.42 kB" in said
    assert "needs preprocessor_config.json" in said


def test_a_tower_that_the_converter_refuses_is_said(toolchain, tmp_path):
    (said,) = left_out(vision.write_llava(tmp_path / "m"))

    assert said.startswith("37 tensors for images (72.26 kB in the checkpoint)")
    assert "Unsupported model type: clip_vision_model" in said


def test_a_tower_under_names_that_the_converter_does_not_know_is_said(
    gemma, toolchain, tmp_path
):
    model = vision.write_gemma3(tmp_path / "m", prefix="model.")
    same_text = api.open_model(str(gemma[0])).layout

    (said,) = left_out(model, same_text)

    assert said.startswith(f"{N_GEMMA} tensors for images")
    assert "knows none of its tensors by name" in said


def test_an_architecture_without_an_mmproj_is_said_and_refused_where_asked_for(
    toolchain, tmp_path
):
    model = vision.write_unknown(tmp_path / "m")
    why = "no mmproj for KeyeForConditionalGeneration"

    (said,) = left_out(model)
    assert said.startswith("37 tensors for images (72.26 kB in the checkpoint)")
    assert why in said

    options = Options(mmproj="f16")
    with pytest.raises(InputError, match=why):
        make_gguf(str(model), tmp_path / "o.gguf", POLICY, options=options)
    assert list(tmp_path.glob("*.gguf")) == []


def test_an_mmproj_of_a_model_that_only_reads_is_refused(toolchain, tmp_path):
    model = write_llama(tmp_path / "text")

    with pytest.raises(UsageError, match="no weights for images or sounds"):
        left_out(model, mmproj="f16")


def test_an_mmproj_of_a_gguf_is_refused_by_its_own_reason(gemma, toolchain):
    source = api.base_file(api.Run(str(gemma[0])))

    with pytest.raises(UsageError, match="is a GGUF file, which is not converted"):
        left_out(source, mmproj="f16")


def test_buffers_of_a_tower_are_no_tensors_for_images(gemma, toolchain, tmp_path):
    from safetensors.torch import load_file, save_file
    from torch import arange

    model = shutil.copytree(gemma[0], tmp_path / "tiny-vlm")
    path, name = model / "model.safetensors", "vision_tower.vision_model.embeddings"
    save_file({**load_file(path), f"{name}.position_ids": arange(4)[None]}, path)
    same_text = api.open_model(str(gemma[0])).layout

    said = left_out(model, same_text, mmproj="none")

    assert any(line.startswith(f"{N_GEMMA} tensors for images") for line in said)


def test_no_mmproj_is_said(gemma, toolchain):
    (said,) = left_out(gemma[0], mmproj="none")

    assert said == (
        f"{N_GEMMA} tensors for images (76.42 kB in the checkpoint) are left out "
        "(--mmproj none)"
    )


def test_the_result_as_json_has_what_was_verified_of_the_mmproj(gemma):
    _, made, _ = gemma
    found = tuple(each.companion for each in made.companions)
    values = json.loads(
        made.verification.model_copy(update={"companions": found}).to_json()
    )

    assert values["companions"][0]["file_sha256"] == store.sha256_file(
        made.companions[0].path
    )
