"""The fake score: one more adapter of the teacher's U-Net, which no other network notices."""

import pytest
import torch
from test_lora import inputs, load_unet, perturb

from lcm_distill.errors import UsageError
from lcm_distill.flags import MatchingFlags
from lcm_distill.models.fake_score import FakeScore
from lcm_distill.models.lora import STUDENT, TARGET, Lora
from lcm_distill.models.unets import cast
from lcm_distill.objective.consistency import guidance_embedding

KINDS = ["teacher", "lora", "lora with a target"]
WIDTH = 32  # of the guidance embedding


class Networks:
    """A U-Net that is a teacher, or a teacher with a trained `Lora`, and what each of its networks answers."""

    def __init__(self, kind: str, teachers: dict[str, str], dropout: float = 0.0):
        self.unet = load_unet(teachers).requires_grad_(False)
        self.lora = None
        if "lora" in kind:
            self.lora = Lora(self.unet, rank=4, alpha=4, dropout=dropout, average="target" in kind)
            perturb(self.lora, STUDENT, seed=1)
            if self.lora.average:
                perturb(self.lora, TARGET, seed=2)

    def answer(self, **more) -> torch.Tensor:
        noisy, timesteps, states = inputs(self.unet)
        return self.unet(noisy, timesteps, states, **more).sample

    @torch.no_grad()
    def answers(self) -> dict[str, torch.Tensor]:
        if self.lora is None:
            return {"teacher": self.answer()}
        torch.manual_seed(0)  # of the student's dropout
        found = {"student": self.answer()}
        with self.lora.off():
            found["teacher"] = self.answer()
        with self.lora.target():
            found["target"] = self.answer()
        return found

    def unchanged_from(self, before: dict[str, torch.Tensor]) -> bool:
        now = self.answers()
        return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


def train(fake_score: FakeScore, spread: float = 0.05) -> None:
    """Changes its weights as training would."""
    generator = torch.Generator().manual_seed(3)
    for parameter in fake_score.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_network_notices_it(kind, teachers):
    """Bit for bit, before and after it was trained and used; it starts as the teacher."""
    networks = Networks(kind, teachers, dropout=0.3)
    before = networks.answers()
    assert kind == "teacher" or not torch.equal(before["student"], before["teacher"])
    fake_score = FakeScore(networks.unet, rank=3)
    assert networks.unchanged_from(before)
    with torch.no_grad(), fake_score.active():
        start = networks.answer()
    assert torch.equal(start, before["teacher"])
    train(fake_score)
    with torch.no_grad(), fake_score.active():
        trained = networks.answer()
        assert torch.equal(trained, networks.answer())  # without the student's dropout
    assert (trained - before["teacher"]).abs().max() > 0.01
    assert networks.unchanged_from(before)
    with pytest.raises(ZeroDivisionError), fake_score.active():
        raise ZeroDivisionError
    assert networks.unchanged_from(before)


@pytest.mark.parametrize("kind", KINDS)
def test_its_weights_train_from_train_on_and_the_student_s_all_the_time(kind, teachers):
    """A DDP around a LoRA's U-Net, created in between, would wait for gradients that the student never has."""
    networks = Networks(kind, teachers)
    student = set(networks.lora.parameters()) if networks.lora else set()
    fake_score = FakeScore(networks.unet, rank=3, time_cond_proj_dim=None if networks.lora else WIDTH)
    own = fake_score.parameters()
    assert {p for p in networks.unet.parameters() if p.requires_grad} == student and not student & set(own)
    fake_score.train()
    assert {p for p in networks.unet.parameters() if p.requires_grad} == student | set(own)

    # Each pass has gradients for its own weights alone.
    w = {} if networks.lora else {"timestep_cond": guidance_embedding(torch.tensor([3.0, 5.0]), WIDTH)}
    with fake_score.active():
        networks.answer(**w).square().mean().backward()
    assert {p for p in networks.unet.parameters() if p.grad is not None} == set(own)
    if networks.lora is None:
        assert not networks.answer().requires_grad
        return
    networks.unet.zero_grad(set_to_none=True)
    networks.answer().square().mean().backward()
    assert {p for p in networks.unet.parameters() if p.grad is not None} == student
    assert all(p.grad.abs().max() > 0 for p in student)


def test_it_may_take_w_which_changes_nothing_at_first(teachers):
    networks = Networks("teacher", teachers)
    before = networks.answers()
    plain, guided = (
        FakeScore(Networks("teacher", teachers).unet, rank=3),
        FakeScore(networks.unet, rank=3, time_cond_proj_dim=WIDTH),
    )
    assert (plain.takes_guidance, guided.takes_guidance) == (False, True)
    embeddings = [guidance_embedding(torch.full((2,), w), WIDTH) for w in (3.0, 5.0)]
    with torch.no_grad(), guided.active():
        assert torch.equal(networks.answer(timestep_cond=embeddings[0]), before["teacher"])
        train(guided)
        low, high = (networks.answer(timestep_cond=embedding) for embedding in embeddings)
    assert (low - high).abs().max() > 1e-3
    assert networks.unchanged_from(before) and len(guided.parameters()) == len(plain.parameters()) + 1


def test_the_flags_make_one_or_none(teachers):
    unet = load_unet(teachers)
    assert FakeScore.from_flags(MatchingFlags(dm_rank=2), unet) is None
    assert not any("lora" in name for name, _ in unet.named_parameters())
    made = FakeScore.from_flags(MatchingFlags(dm_weight=0.1, dm_rank=2), unet, target_modules=["to_q"])
    assert made is not None
    names = [name for name in made.state_dict() if "lora_A" in name]
    assert names and all(".to_q." in name and made.state_dict()[name].shape[0] == 2 for name in names)


@pytest.mark.parametrize("kind, width", [("teacher", WIDTH), ("teacher", None), ("lora with a target", None)])
def test_a_saved_one_is_restored_bitwise(kind, width, teachers, tmp_path):
    networks, others = Networks(kind, teachers), Networks(kind, teachers)
    saved = FakeScore(networks.unet, rank=3, time_cond_proj_dim=width)
    train(saved)
    saved.save(tmp_path / "fake_score")
    before = others.answers()
    loaded = FakeScore(others.unet, rank=3, time_cond_proj_dim=width)
    loaded.load(tmp_path / "fake_score")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), loaded.parameters(), strict=True))
    assert sum(p.numel() for p in saved.parameters()) == sum(w.numel() for w in saved.state_dict().values())
    w = {} if width is None else {"timestep_cond": guidance_embedding(torch.tensor([3.0, 5.0]), width)}
    answers = []
    for own, fake_score in ((networks, saved), (others, loaded)):
        with torch.no_grad(), fake_score.active():
            answers.append(own.answer(**w))
    assert torch.equal(*answers) and others.unchanged_from(before)
    loaded.train()  # loading leaves what trains as it was, too
    student = set(others.lora.parameters()) if others.lora else set()
    assert {p for p in others.unet.parameters() if p.requires_grad} == student | set(loaded.parameters())


@pytest.mark.hostile("checkpoints")
@pytest.mark.parametrize(
    "other", [{"rank": 4}, {"rank": 3, "time_cond_proj_dim": WIDTH}, {"rank": 3, "target_modules": ["to_q"]}]
)
def test_one_of_another_shape_is_refused(other, teachers, tmp_path):
    FakeScore(load_unet(teachers), rank=3).save(tmp_path)
    made = FakeScore(load_unet(teachers), **other)
    before = {name: weight.clone() for name, weight in made.state_dict().items()}
    with pytest.raises(UsageError, match="--dm_rank: the checkpoint's fake score has another rank"):
        made.load(tmp_path)
    assert all(torch.equal(weight, before[name]) for name, weight in made.state_dict().items())


@pytest.mark.parametrize("with_lora", [False, True])
def test_it_is_float32_on_a_base_in_half_precision(with_lora, teachers, tmp_path):
    unet = load_unet(teachers).requires_grad_(False)
    cast(unet, torch.bfloat16)
    lora = Lora(unet, rank=4, alpha=4) if with_lora else None
    fake_score = FakeScore(unet, rank=3, time_cond_proj_dim=None if lora else WIDTH)
    assert {parameter.dtype for parameter in fake_score.parameters()} == {torch.float32}
    own = {id(p) for p in (*fake_score.parameters(), *(lora.parameters() if lora else ()))}
    assert torch.bfloat16 in {p.dtype for p in unet.parameters() if id(p) not in own}
    fake_score.train()
    noisy, timesteps, states = (x.bfloat16() if x.is_floating_point() else x for x in inputs(unet))
    w = {} if lora else {"timestep_cond": guidance_embedding(torch.tensor([3.0, 5.0]), WIDTH).bfloat16()}
    with torch.autocast("cpu", torch.bfloat16), fake_score.active():
        unet(noisy, timesteps, states, **w).sample.float().square().mean().backward()
    assert {parameter.grad.dtype for parameter in fake_score.parameters()} == {torch.float32}
    fake_score.save(tmp_path)
    assert {weight.dtype for weight in fake_score.state_dict().values()} == {torch.float32}
