"""The fast steps of support/decoding give the text that the network's own forward pass gives, and where they
do not fit, that pass is used."""

import contextlib
import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from answering import craft, output_of, tiny_model
from test_model import DEVICES, GPT2, build, tokens
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import infer
import model as model_module
from lora import add_adapters
from sampling import PlainDecoder, SamplingConfig, generate_tokens
from support.decoding import fast, lean_step
from support.decoding.lean_step import LeanStep
from support.decoding.static_step import RecordedStep, StaticStep, buffer_length, logits_after
from support.evaluation.likelihoods import continue_together
from support.messages import UserError
from tokenizer import ByteTokenizer

WINDOW = 40
GREEDY = SamplingConfig(temperature=0)
DRAWN = SamplingConfig(temperature=1.5, top_k=7, top_p=0.95, repetition_penalty=1.3)
STEPS = pytest.mark.parametrize("step", [LeanStep, StaticStep], ids=lambda step: step.__name__)
SWITCHES = [
    {},
    {"n_kv_heads": 4},
    {"n_kv_heads": 1, "qk_norm": True},
    {"norm": "layernorm"},
    {"norm": "layernorm", "bias": True, "embed_scale": True},
    {"mlp": "gelu", "tie_embeddings": False},
    {"position": "learned", "embed_scale": True},
    {"position": "sinusoidal", "n_kv_heads": 4, "head_dim": 10},
    {"bias": True, "qk_norm": True, "tie_embeddings": False, "norm_eps": 0.1},
    {"position": "learned", "n_heads": 3, "head_dim": 5, "n_kv_heads": 1},  # an odd width of a head
    GPT2,
]


def network(**switches) -> nn.Module:
    return build(model_module, max_seq_len=WINDOW, **switches)


class Watch:
    """Uses one kind of step (None: none at all), and counts the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.monkeypatch, self.steps = monkeypatch, 0

    def use(self, step: type | None) -> None:
        self.steps = 0
        if step is None:
            self.monkeypatch.setattr(fast, "is_known", lambda model: False)
            return

        def counted(*args):
            made = step(*args)

            def call(*inputs):
                self.steps += 1
                return made(*inputs)

            return call

        self.monkeypatch.setattr(fast, "is_known", IS_KNOWN)
        self.monkeypatch.setattr(fast, "step_class", lambda model: counted)


IS_KNOWN, FUSED, ROW_AS_PAIR = fast.is_known, model_module.fused_attention, lean_step.row_as_pair


@pytest.fixture
def watch(monkeypatch, capsys):
    """After each test: nobody was warned, unless the test has read the warning."""
    yield Watch(monkeypatch)
    assert capsys.readouterr().err == ""


def written(net: nn.Module, ids: Tensor, n: int, sampling: SamplingConfig = GREEDY, **options) -> list:
    generator = torch.Generator().manual_seed(5)
    return net.generate(ids, n, sampling, generator=generator, **options).tolist()


def both_ways(watch: Watch, step: type, net: nn.Module, *args, **options) -> tuple[list, list]:
    """What is written with the step, and without."""
    watch.use(None)
    plain = written(net, *args, **options)
    watch.use(step)
    return written(net, *args, **options), plain


# ---- the same text -------------------------------------------------------------------------------


@pytest.mark.parametrize("amd", [True, False], ids=["amd", "other-cpu"])
def test_on_either_maker_s_processor_a_row_is_multiplied_right(watch, monkeypatch, amd):
    """On AMD's a row is computed as a pair of rows."""
    monkeypatch.setattr(lean_step, "has_amd_cpu", lambda: amd)
    pairs = []
    monkeypatch.setattr(lean_step, "row_as_pair", lambda linear: pairs.append(linear) or ROW_AS_PAIR(linear))
    for switches in ({"bias": True, "n_kv_heads": 4}, GPT2):
        fast_text, plain = both_ways(watch, LeanStep, network(**switches), tokens(1, 6), 30)
        assert fast_text == plain
    assert bool(pairs) is amd


@STEPS
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_for_each_switch_the_text_is_that_of_the_forward_pass_also_past_the_window(watch, step, switches):
    net = network(**switches)
    for batch_size, prompt_len in ((1, 6), (3, 1)):
        ids = tokens(batch_size, prompt_len)
        fast_text, plain = both_ways(watch, step, net, ids, 50)
        assert fast_text == plain
        assert watch.steps == WINDOW - prompt_len, "each token in the window but the first"


@STEPS
@pytest.mark.parametrize("prompt_len", [1, WINDOW - 1, WINDOW, WINDOW + 9])
def test_a_prompt_may_be_one_token_fill_the_window_or_be_longer(watch, step, prompt_len):
    fast_text, plain = both_ways(watch, step, network(), tokens(2, prompt_len), 45, DRAWN)
    assert fast_text == plain
    assert watch.steps == max(WINDOW - prompt_len, 0)


@STEPS
def test_the_same_tokens_are_drawn_with_the_same_generator(watch, step):
    for seed in range(3):
        fast_text, plain = both_ways(watch, step, network(), tokens(3, 5, seed=seed), 30, DRAWN)
        assert fast_text == plain
        assert watch.steps == 29


@STEPS
def test_rows_that_end_at_different_times(watch, step):
    """With each token as EOS in turn, so that some rows end soon and some late."""
    net, ends = network(), set()
    for eos in range(11):
        fast_text, plain = both_ways(watch, step, net, tokens(3, 4), 30, DRAWN, eos_id=eos)
        assert fast_text == plain
        ends.update(row.index(eos, 4) for row in plain if eos in row[4:])
    assert len(ends) > 3, "the rows should end at different times"


@STEPS
def test_two_texts_may_be_written_in_turn_by_one_model(watch, step):
    net, prompts = network(), [tokens(1, 4), tokens(1, 6, seed=1)]
    watch.use(step)
    streams = [generate_tokens(net, ids, 20, GREEDY) for ids in prompts]
    pairs = [(one.item(), other.item()) for one, other in zip(*streams, strict=True)]
    alone = [written(net, ids, 20)[0][ids.shape[1] :] for ids in prompts]
    assert pairs == list(zip(*alone, strict=True))


@STEPS
def test_changed_weights_count_in_the_next_text_and_in_one_that_is_being_written(watch, step):
    net, ids = network(), tokens(1, 4)

    @torch.no_grad()
    def with_a_change() -> list[int]:
        stream = generate_tokens(net, ids, 30, GREEDY)
        text = [next(stream).item() for _ in range(10)]
        weights = copy.deepcopy(net.state_dict())
        for p in net.parameters():
            p.mul_(0.8)
        text += [token.item() for token in stream]
        net.load_state_dict(weights)
        return text

    watch.use(None)
    before, plain = written(net, ids, 30), with_a_change()
    assert plain != before[0][4:]
    watch.use(step)
    assert written(net, ids, 30) == before
    assert with_a_change() == plain
    net.load_state_dict({name: -weight for name, weight in net.state_dict().items()})
    fast_text, plain = both_ways(watch, step, net, ids, 30)
    assert fast_text == plain != before


@STEPS
@pytest.mark.parametrize("switches", [{}, {"qk_norm": True, "bias": True}, GPT2], ids=str)
def test_with_bf16_weights_the_logits_are_as_near_to_those_in_float32_as_the_forward_pass_s(
    watch, step, switches
):
    """Not always the same text: in bf16 two logits are often equal, and rounding decides."""
    net, ids = network(**switches).to(torch.bfloat16), tokens(2, WINDOW)
    watch.use(step)
    found = []
    with torch.no_grad():
        exact = copy.deepcopy(net).float()(ids)[:, 5:]  # (B, S, V)
        for decoder in (PlainDecoder(net, 2), fast.fast_decoder(PlainDecoder(net, 2), 5, WINDOW)):
            logits = [decoder.next_logits(ids[:, :end]).clone() for end in range(5, WINDOW + 1)]
            assert logits[0].dtype == torch.bfloat16
            found.append(torch.stack(logits[1:], dim=1))
    plain, ours = ((logits - exact).norm() / exact.norm() for logits in found)
    assert watch.steps == WINDOW - 5
    assert 0 < ours < 1.5 * plain < 0.1


@STEPS
def test_matrices_norms_and_mlps_that_are_not_the_plain_ones_are_called_as_they_are(watch, step):
    class Halved(nn.Module):
        def __init__(self, inner: nn.Module):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) / 2

    net = network()
    add_adapters(net, rank=2, alpha=3.0, targets=["q_proj", "o_proj", "down_proj"])
    for name, p in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, generator=torch.Generator().manual_seed(2))
    net.layers[0].mlp = Halved(net.layers[0].mlp)
    net.layers[1].input_layernorm = Halved(net.layers[1].input_layernorm)
    net.norm = Halved(net.norm)
    net.lm_head = Halved(net.lm_head)
    net.eval()
    fast_text, plain = both_ways(watch, step, net, tokens(2, 5), 30, DRAWN)
    assert fast_text == plain
    assert watch.steps == 29


def test_evaluation_continues_many_prompts_with_the_step_and_gives_each_its_own_text(watch):
    net, lengths = network(), [18, 20, 22]
    prompts = [tokens(n).tolist() for n in (3, 9, 5)]
    watch.use(LeanStep)
    together = continue_together(net, prompts, lengths, eos_id=999)
    assert watch.steps == 25, "of the 26 tokens after the shortest prompt's, all but the first"
    alone = [written(net, torch.tensor([p]), n)[0] for p, n in zip(prompts, lengths, strict=True)]
    assert together == [row[len(p) :] for row, p in zip(alone, prompts, strict=True)]


def test_tokens_written_can_be_trained_on():
    """What inference mode makes cannot be used in a backward pass: nothing of it may get out."""
    net = network()
    ids = net.generate(tokens(2, 5), 20, DRAWN)
    net(ids[:, :-1], labels=ids[:, 1:])[0].backward()
    assert net.embed_tokens.weight.grad.abs().sum() > 0


# ---- which way is used ---------------------------------------------------------------------------


@pytest.mark.parametrize("switches", [{}, GPT2], ids=["Llama", "GPT-2"])
def test_on_a_cpu_the_lean_step_is_used_without_asking(monkeypatch, switches):
    calls, real = [], LeanStep.__call__
    monkeypatch.setattr(LeanStep, "__call__", lambda *args: calls.append(1) or real(*args))
    network(**switches).generate(tokens(1, 5), 20)
    assert len(calls) == 19


class OtherAttention(model_module.GQAMultiheadAttention):
    pass


def in_training(net: nn.Module) -> nn.Module:
    return net.train()


def with_a_hook(net: nn.Module) -> nn.Module:
    net.layers[1].mlp.register_forward_pre_hook(lambda module, args: None)
    return net


def in_float64(net: nn.Module) -> nn.Module:
    return net.double()


def with_other_attention(net: nn.Module) -> nn.Module:
    net.layers[0].self_attn.__class__ = OtherAttention
    return net


@pytest.mark.parametrize("change", [in_training, with_a_hook, in_float64, with_other_attention])
def test_an_unusual_model_is_left_to_its_own_forward_pass_without_a_word(watch, change):
    net = change(network())
    assert not fast.is_known(net)
    fast_text, plain = both_ways(watch, LeanStep, net, tokens(1, 5), 30)
    assert (fast_text, watch.steps) == (plain, 0)


def test_under_autocast_and_for_a_few_tokens_the_forward_pass_is_used(watch):
    watch.use(LeanStep)
    with torch.autocast("cpu", torch.bfloat16):
        network().generate(tokens(1, 5), 30)
    network().generate(tokens(1, 5), fast.WORTH_IT - 1)
    assert watch.steps == 0
    network().generate(tokens(1, 5), fast.WORTH_IT)
    assert watch.steps == fast.WORTH_IT - 1


@pytest.mark.parametrize("step", [LeanStep, StaticStep, RecordedStep], ids=lambda step: step.__name__)
def test_a_changed_model_is_noticed_at_the_first_step_and_written_with_as_it_is(
    watch, monkeypatch, capsys, step
):
    """A reader tries another attention in model.py. RecordedStep needs a GPU, so it fails here instead."""

    def sharper(q, k, v, mask, dropout):
        return FUSED(2 * q, k, v, mask, dropout)

    monkeypatch.setattr(model_module, "fused_attention", sharper)
    fast_text, plain = both_ways(watch, step, network(), tokens(2, 5), 50)
    assert (fast_text, watch.steps) == (plain, 1)
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("; the forward pass is used, which is slower")
    assert "gives other logits" in line or (step is RecordedStep and "failed (" in line)


def test_a_step_that_fails_leaves_the_text_to_the_forward_pass(watch, capsys):
    class Broken(LeanStep):
        def __call__(self, token: Tensor, position: int) -> Tensor:
            super().__call__(token + 1, position)  # wrong keys and values are left in the cache
            raise RuntimeError("no kernel\nfor this")

    fast_text, plain = both_ways(watch, Broken, network(), tokens(2, 5), 50)
    assert fast_text == plain
    assert capsys.readouterr().err == (
        "warning: the fast step of decoding failed (RuntimeError: no kernel for this); the forward pass is "
        "used, which is slower\n"
    )


# ---- what a step does ----------------------------------------------------------------------------


class NewMemory(TorchFunctionMode):
    """Counts the calls of PyTorch, and the bytes of results that are in no tensor known before."""

    def __init__(self):
        super().__init__()
        self.calls = self.bytes = 0

    def __torch_function__(self, operation, types, args=(), kwargs=None):
        inputs = [*args, *(kwargs or {}).values()]
        known = {t.untyped_storage().data_ptr() for t in inputs if isinstance(t, Tensor)}
        result = operation(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes += tensor.untyped_storage().nbytes()
        return result


def memory_of_a_step(decoder, ids: Tensor, ends: list[int]) -> list[tuple[int, int]]:
    """(calls, new bytes) of the steps for the texts of these lengths."""
    found = []
    with torch.no_grad():
        for end in range(5, ids.shape[1] + 1):
            with NewMemory() if end in ends else contextlib.nullcontext() as count:
                decoder.next_logits(ids[:, :end])
            if end in ends:
                found.append((count.calls, count.bytes))
    return found


def test_a_lean_step_takes_little_memory_and_no_more_for_a_longer_text():
    net, ids = network(n_layers=6, n_kv_heads=4), tokens(1, WINDOW)
    lean = fast.fast_decoder(PlainDecoder(net, 1), 5, WINDOW)
    early, late = memory_of_a_step(lean, ids, [10, WINDOW])
    plain, _ = memory_of_a_step(PlainDecoder(net, 1), ids, [10, WINDOW])
    assert early == late
    assert late[0] < plain[0] / 1.5 and late[1] < plain[1] / 10


def test_buffers_of_a_static_step_have_few_lengths():
    assert [buffer_length(n, window=1000) for n in (3, 64, 65, 400, 1000)] == [64, 64, 128, 512, 1000]
    assert buffer_length(30, window=40) == 40


def test_memory_that_nobody_has_written_does_not_get_into_a_static_step():
    net, ids = network(), tokens(2, 6)
    with torch.no_grad():
        plain = PlainDecoder(net, 2)
        for buffer in (*plain.cache.keys, *plain.cache.values):
            buffer.fill_(float("nan"))
        plain.next_logits(ids[:, :5])
        step = StaticStep(net, plain.cache, 30)
        logits = step(ids[:, 5], 5)
        torch.testing.assert_close(logits, plain.next_logits(ids))


def test_a_recorded_step_is_recorded_once_and_run_again_for_each_token(watch, monkeypatch):
    """Without a GPU: in place of the recording, the step itself, which writes into the tensor that the
    recording would write into."""
    events = []

    def record(self):
        events.append("record")
        logits = StaticStep.run(self)

        def replay():
            events.append("replay")
            logits.copy_(StaticStep.run(self))

        return SimpleNamespace(replay=replay), logits

    monkeypatch.setattr(RecordedStep, "record", record)
    fast_text, plain = both_ways(watch, RecordedStep, network(), tokens(2, 5), 50, DRAWN)
    assert fast_text == plain
    assert events == ["record"] + ["replay"] * (WINDOW - 5)


@pytest.mark.parametrize("device", [device for device in DEVICES if device != "mps"])
def test_on_a_gpu_the_recorded_step_gives_the_logits_of_the_forward_pass(watch, device):
    """And on a CPU the same step, not recorded."""
    net, ids = network().to(device), tokens(2, WINDOW).to(device)
    watch.use(RecordedStep if device == "cuda" else StaticStep)
    plain, decoder = PlainDecoder(net, 2), fast.fast_decoder(PlainDecoder(net, 2), 5, WINDOW)
    with torch.no_grad():
        for end in range(5, WINDOW + 1):
            logits, expected = decoder.next_logits(ids[:, :end]), plain.next_logits(ids[:, :end])
            assert (logits - expected).abs().max() < 0.01 * expected.abs().max(), end
    assert watch.steps == WINDOW - 5


# ---- --compile -----------------------------------------------------------------------------------


def test_compile_asks_for_the_static_step_compiled(watch, monkeypatch):
    """Compiled without generating code, which takes a minute."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    net, ids = network(), tokens(2, 5)
    watch.use(None)
    plain = written(net, ids, 30, DRAWN)
    monkeypatch.setattr(fast, "is_known", IS_KNOWN)
    net.compile_decoding = True
    made = fast.step_class(net)
    assert made.func is StaticStep and made.keywords["function"] is not logits_after
    assert written(net, ids, 30, DRAWN) == plain


def test_a_missing_compiler_is_one_short_message(monkeypatch, tmp_path, capsys):
    def broken(*args, **kwargs):
        from torch._inductor.exc import InvalidCxxCompiler

        raise InvalidCxxCompiler

    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: broken)
    ckpt = craft(tmp_path / "m.ckpt", tiny_model(257, max_seq_len=WINDOW), ByteTokenizer())
    with pytest.raises(
        UserError, match=r"^--compile needs a C\+\+ compiler.*, or leave out --compile$"
    ) as error:
        infer.main(["--ckpt", ckpt, "--prompt", "a", "--compile", "--device", "cpu"])
    assert len(str(error.value).splitlines()) <= 2
    assert "training.compile" not in str(error.value)
    assert len(output_of(capsys, "--ckpt", ckpt, "--prompt", "a")[0]) > 2
