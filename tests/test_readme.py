"""The README's first run, as it stands, but with a toy teacher and on a CPU: fewer steps, smaller batches, no bf16."""

import importlib
import importlib.util
import itertools
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from PIL import Image, ImageStat

from toy.compare import STEPS, wide_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/reference.md")}
REAL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
FEWER = {
    "--max_train_steps 2000": "--max_train_steps 2",
    "--train_batch_size 12": "--train_batch_size 2",
    "--mixed_precision bf16": "--mixed_precision no",  # which CPUs without instructions for it emulate
}
SMALLER = {
    "train_lcm_distill_lora_sd_wds": "--resolution 64 --num_validation_images 1 --validation_teacher_steps 1",
    "sample": "--teacher_steps 2",
}


def steps() -> list[tuple[str, list[str]]]:
    """(name, commands) of each numbered step of the first run."""
    text = README[README.index("## Your first run") : README.index("### Which program")]
    parts = re.split(r"^\*\*(\d\. [^*]+)\*\*", text, flags=re.M)[1:]
    return [
        (name, re.findall(r"^```sh\n(.*?)^```", body, re.S | re.M))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    ]


STEPS_OF_README = dict(steps())


def test_the_first_run_is_six_numbered_commands():
    assert [name for name, _ in steps()] == [
        *("1. Captions", "2. Pack", "3. Dry run", "4. Train", "5. Generate", "6. Export")
    ]
    assert [len(commands) for _, commands in steps()] == [1] * 6
    (dry,), (train,) = STEPS_OF_README["3. Dry run"], STEPS_OF_README["4. Train"]
    assert dry == train.rstrip("\n") + " --dry_run\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands are typed, with twenty pictures in photos/."""
    folder = tmp_path_factory.mktemp("first")
    (folder / "photos").mkdir()
    for number in range(20):
        Image.radial_gradient("L").convert("RGB").rotate(number).save(folder / "photos" / f"{number}.jpg")
    return folder


def type_in(name: str, folder: Path, teacher: str, run) -> None:
    """Runs the command of a step in this process, as a shell would start it in `folder`."""
    (command,) = STEPS_OF_README[name]
    replaced = FEWER | {REAL: teacher} if name in ("3. Dry run", "4. Train") else {REAL: teacher}
    for given, other in replaced.items():
        assert given in command or name == "2. Pack"
        command = command.replace(given, other)
    words = shlex.split(command.replace("\\\n", " "))
    if words[:2] == ["accelerate", "launch"]:
        program = words[2].removesuffix(".py")
        run(program, [*words[3:], *SMALLER[program].split(), "--report_to", "none"])
    else:
        assert words[:2] == ["python", "-m"]
        command = words[2].removeprefix("lcm_distill.")
        more = SMALLER.get(command, "").split()
        importlib.import_module(words[2]).main([*words[3:], *more])


def test_the_first_run_ends_with_a_picture(folder, teacher, run, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for number in range(20):
        (folder / "photos" / f"{number}.txt").write_text(f"photograph number {number}")
    type_in("2. Pack", folder, teacher, run)
    assert "1 shard, 20 samples" in capsys.readouterr().out
    type_in("3. Dry run", folder, teacher, run)
    assert not (folder / "lcm-lora").exists()
    type_in("4. Train", folder, teacher, run)
    assert (folder / "lcm-lora" / "report.html").exists() and (folder / "lcm-lora" / "checkpoint-2").exists()
    type_in("5. Generate", folder, teacher, run)
    grid = Image.open(folder / "drawn" / "grid.png")
    assert max(ImageStat.Stat(grid).stddev) > 20 and len(list((folder / "drawn" / "pictures").iterdir())) == 2 * 4
    if importlib.util.find_spec("lcm_distill.export_model"):
        type_in("6. Export", folder, teacher, run)
        assert (folder / "lcm.safetensors").stat().st_size > 10**6


@pytest.fixture(scope="module")
def captioner(tmp_path_factory) -> Path:
    """A small BLIP that sees red everywhere."""
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "cat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
    config = transformers.BlipConfig(
        text_config={"vocab_size": len(words), "encoder_hidden_size": 16} | small | special,
        vision_config={"image_size": 32, "patch_size": 16} | small,
    )
    torch.manual_seed(0)
    blip = transformers.BlipForConditionalGeneration(config)
    blip.text_decoder.get_output_embeddings().bias.data[words.index("red")] = 100
    blip.save_pretrained(folder)
    name = "BlipImageProcessorPil" if hasattr(transformers, "BlipImageProcessorPil") else "BlipImageProcessor"
    pictures = getattr(transformers, name)(size={"height": 32, "width": 32})
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    transformers.BlipProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def test_the_captioner_writes_what_the_packer_reads(captioner, tmp_path, monkeypatch, capsys):
    (command,) = STEPS_OF_README["1. Captions"]
    start, end = "python - photos <<'END'\n", "END\n"
    assert command.startswith(start) and command.endswith(end)
    code, count = re.subn(r'^name = ".*"$', f"name = {str(captioner)!r}", command[len(start) : -len(end)], flags=re.M)
    assert count == 1
    (tmp_path / "photos").mkdir()
    Image.new("L", (40, 30), 90).save(tmp_path / "photos" / "a.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["-", "photos"])
    exec(compile(code, "README.md", "exec"), {})
    caption = (tmp_path / "photos" / "a.txt").read_text()
    assert set(caption.split()) == {"red"}
    importlib.import_module("lcm_distill.pack_shards").main(["photos", "shards"])
    assert "1 sample" in capsys.readouterr().out


def test_captions_in_one_file_are_read_as_the_readme_writes_them(tmp_path, capsys):
    (line,) = re.findall(r'`(\{"file_name".*?\})`', README)
    (tmp_path / "photos").mkdir()
    Image.new("L", (40, 30), 90).save(tmp_path / "photos" / "cat.jpg")
    (tmp_path / "photos" / "metadata.jsonl").write_text(line + "\n")
    importlib.import_module("lcm_distill.pack_shards").main([str(tmp_path / "photos"), str(tmp_path / "shards")])
    assert "1 sample" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------- tables and links


def test_the_table_is_made_by_the_command_beside_it():
    """By `toy.demo`, whose comparison writes it: the same heading and the same labels, in the same order."""
    lines = README[README.index("| model | 1 | 2") :].splitlines()
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines))
    rows = []
    for line in table[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        label, reference = re.fullmatch(r"(.*?)(?: \((.*)\))?", cells[0].replace("**", "")).groups()
        model = label.replace(" teacher,", "")
        if reference:
            share, distance = re.fullmatch(r"(\.\d+) and (\d+) at 50 steps", reference).groups()
            values = {"caption_accuracy": float(share), "frechet_distance": float(distance)}
            rows.append(SimpleNamespace(model=model, steps=50, values=values, is_reference=True))
        for place, count in enumerate(STEPS):
            accuracy, distance = float(cells[1 + place]), float(cells[5 + place])
            values = {"caption_accuracy": accuracy, "frechet_distance": distance}
            rows.append(SimpleNamespace(model=model, steps=count, values=values, is_reference=False))
    assert wide_table(rows) == "\n".join(table)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\(([^)]+)\)", PAGES[page])
    assert len(links) > 5
    for link in links:
        if link.startswith("https:"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link
