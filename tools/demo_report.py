"""What a trained demo model can do: match rates over its questions, and a few sample dialogues."""

import difflib
from dataclasses import dataclass

import sentencepiece
import torch
from demo_data import FALLBACK, Entry, build_prompt, is_chinese
from transformers import GlmForCausalLM

BATCH = 96
SHOWN_MISSES = 8
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_p": 0.7, "top_k": 50}  # the API's defaults
GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
UNSEEN_OPENERS = ["遵命，", "老实说，", "By the way, ", "Frankly, "]
SAMPLES = (
    ("你好", "你是谁", "那英文版呢？"),
    ("怎么得到真正的模型？", "它多大？", "需要多少显存"),
    ("什么是量化", "int8 呢？", "谢谢！"),
    ("你好，我叫小明", "讲个笑话", "再来一个", "我叫什么？"),
    ("Hello!", "What can you do?", "How do I get the real model?", "How big is it?"),
    ("What is quantization?", "And int4?", "tell me a story"),
    ("鱼香肉丝怎么做才好吃", "你会修冰箱吗", "Who won the world cup in 1998?", "Write me a Haskell program"),
)


@dataclass(frozen=True)
class Case:
    """A prompt with what should follow."""

    prompt: str
    expected: str
    prefix: str = ""


class Answerer:
    """Generates answers for text prompts in batches."""

    def __init__(self, network: GlmForCausalLM, sp: sentencepiece.SentencePieceProcessor) -> None:
        self.network, self.sp = network, sp

    def __call__(self, prompts: list[str], mode: dict, limit: int = 450) -> list[str | None]:
        """The text after each prompt, or None where the model does not stop within `limit` tokens."""
        answers: dict[int, str | None] = {}
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), BATCH):
            chunk = order[start:start + BATCH]
            answers.update(zip(chunk, self._batch([prompts[i] for i in chunk], mode, limit), strict=True))
        return [answers[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _batch(self, prompts: list[str], mode: dict, limit: int) -> list[str | None]:
        count = self.sp.get_piece_size()
        rows = [[count + 1, count + 3, *ids] for ids in self.sp.encode(prompts)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        out = self.network.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, **mode)
        return [self._text(row) for row in out[:, width:].tolist()]

    def _text(self, ids: list[int]) -> str | None:
        if self.sp.eos_id() not in ids:
            return None
        ids = ids[:ids.index(self.sp.eos_id())]
        return self.sp.decode([i for i in ids if i < self.sp.get_piece_size()])


def question_cases(entries: list[Entry]) -> list[Case]:
    """Every wording of every first round; of the entries with words the first, middle and last dialogue."""
    cases = []
    for entry in entries:
        count = len(entry.dialogues)
        for dialogue in (entry.dialogues[i] for i in sorted({0, count // 2, count - 1})):
            cases += [Case(build_prompt([], q), dialogue[0].answer) for q in dialogue[0].questions if "{" not in q]
    return cases


def follow_up_cases(entries: list[Entry]) -> list[Case]:
    """Every wording of every later round, directly after the first one."""
    cases = []
    for entry in entries:
        count = len(entry.dialogues)
        for first, *later in (entry.dialogues[i] for i in sorted({0, count // 2, count - 1})):
            history = [(first.questions[0], first.answer)]
            cases += [Case(build_prompt(history, q), turn.answer) for turn in later for q in turn.questions]
    return cases


def history_cases(entries: list[Entry]) -> list[Case]:
    """The first wording of each entry after three unrelated rounds."""
    firsts = [entry.dialogues[0][0] for entry in entries if entry.source != FALLBACK]
    cases = []
    for i, first in enumerate(firsts):
        others = [firsts[(i + step) % len(firsts)] for step in (17, 41, 83)]
        history = [(other.questions[0], other.answer) for other in others]
        cases.append(Case(build_prompt(history, first.questions[0]), first.answer))
    return cases


def prefix_cases(entries: list[Entry], openers: list[str]) -> tuple[list[Case], list[Case]]:
    """Answers cut after a third, and answers after a foreign opening."""
    cut, opened = [], []
    for i, entry in enumerate(entry for entry in entries if entry.source != FALLBACK):
        first = entry.dialogues[0][0]
        prompt, at = build_prompt([], first.questions[0]), max(1, len(first.answer) // 3)
        cut.append(Case(prompt, first.answer[at:], first.answer[:at]))
        matching = [opener for opener in openers if is_chinese(opener) == is_chinese(first.answer)]
        opened.append(Case(prompt, first.answer, matching[i % len(matching)]))
    return cut, opened


def measure(answerer: Answerer, cases: list[Case], mode: dict) -> tuple[float, float, list[tuple[Case, str | None]]]:
    """Shares of exact and of near-exact answers (spaces aside; similarity from 0.9), and the misses."""
    def squeeze(text: str | None) -> str:
        return "".join((text or "").split())

    exact, near, misses = 0, 0, []
    answers = answerer([case.prompt + case.prefix for case in cases], mode)
    for case, answer in zip(cases, answers, strict=True):
        alike = difflib.SequenceMatcher(None, squeeze(answer), squeeze(case.expected)).ratio()
        exact += squeeze(answer) == squeeze(case.expected)
        near += alike >= 0.9
        if alike < 0.9:
            misses.append((case, answer))
    return exact / len(cases), near / len(cases), misses


def print_report(network: GlmForCausalLM, quantized: dict[str, GlmForCausalLM],
                 sp: sentencepiece.SentencePieceProcessor, entries: list[Entry], held: list[tuple[str, str]],
                 openers: list[str]) -> None:
    """Print the match rates, with some of the misses, and sample dialogues.

    `quantized` holds rounded copies of the network under a name; `held` are (question, answer) not trained on.
    """
    torch.manual_seed(0)
    answerer = Answerer(network, sp)
    trained, follow_ups = question_cases(entries), follow_up_cases(entries)
    cut, opened = prefix_cases(entries, [opener for opener in openers if "{" not in opener])
    unseen = [Case(build_prompt([], question), answer) for question, answer in held]
    rows = [("trained questions, greedy", answerer, trained, GREEDY),
            ("trained questions, sampled", answerer, trained, SAMPLING),
            ("held-out wordings, greedy", answerer, unseen, GREEDY),
            ("follow-ups, greedy", answerer, follow_ups, GREEDY),
            ("follow-ups, sampled", answerer, follow_ups, SAMPLING),
            ("after unrelated history", answerer, history_cases(entries), GREEDY),
            ("answer prefix, own", answerer, cut, GREEDY),
            ("answer prefix, foreign", answerer, opened, GREEDY),
            ("answer prefix, never seen", answerer, prefix_cases(entries, UNSEEN_OPENERS)[1], GREEDY),
            *((f"trained questions, {name}", Answerer(copy, sp), trained, GREEDY) for name, copy in quantized.items())]
    for label, which, cases, mode in rows:
        exact, near, misses = measure(which, cases, mode)
        print(f"{label:36} {len(cases):5} cases  exact {exact:6.1%}  near {near:6.1%}", flush=True)
        for case, answer in misses[:SHOWN_MISSES]:
            print(f"    {case.prompt[-40:]!r} {case.prefix!r} -> {answer!r}")
    print_dialogues(answerer)


def print_dialogues(answerer: Answerer) -> None:
    """Print the SAMPLES, each question with the answers before it as history."""
    for questions in SAMPLES:
        history: list[tuple[str, str]] = []
        print()
        for question in questions:
            answer = (answerer([build_prompt(history, question)], SAMPLING)[0] or "(does not stop)").strip()
            history.append((question, answer))
            print(f"? {question}\n> {answer}")
