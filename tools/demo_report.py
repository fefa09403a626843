"""What a trained demo model can do: match rates over its questions, and a few sample dialogues."""

import difflib
from dataclasses import dataclass

import sentencepiece
import torch
from demo_data import CLAUSE_END, FALLBACK, Entry, build_prompt, is_chinese
from transformers import GlmForCausalLM

BATCH = 96
SHOWN_MISSES = 8
SPARE_TOKENS = 30  # how much longer than expected an answer may be
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

    @torch.inference_mode()
    def __call__(self, prompts: list[str], mode: dict, limit: int = 450) -> list[str | None]:
        """The text after each prompt, or None where the model does not stop within `limit` tokens."""
        count = self.sp.get_piece_size()
        rows = [[count + 1, count + 3, *ids] for ids in self.sp.encode(prompts)]  # [gMASK] sop
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


def _first_questions(entries: list[Entry]) -> list[tuple[str, str]]:
    """The prompt of the first wording of each entry, and the answer."""
    firsts = [entry.dialogues[0][0] for entry in entries if entry.source != FALLBACK]
    return [(build_prompt([], first.questions[0]), first.answer) for first in firsts]


def clause_cases(entries: list[Entry]) -> list[Case]:
    """Answers whose first clause is given."""
    cuts = ((prompt, answer, CLAUSE_END.search(answer)) for prompt, answer in _first_questions(entries))
    return [Case(prompt, answer[end.end():], answer[:end.end()]) for prompt, answer, end in cuts if end]


def cut_cases(entries: list[Entry]) -> list[Case]:
    """Answers of which a third is given, mostly ending inside a word: the hardest beginning."""
    return [Case(prompt, answer[len(answer) // 3 + 1:], answer[:len(answer) // 3 + 1])
            for prompt, answer in _first_questions(entries)]


def opened_cases(entries: list[Entry], openers: list[str]) -> list[Case]:
    """Answers after a foreign opening in their language."""
    cases = []
    for i, (prompt, answer) in enumerate(_first_questions(entries)):
        matching = [opener for opener in openers if is_chinese(opener) == is_chinese(answer)]
        cases.append(Case(prompt, answer, matching[i % len(matching)]))
    return cases


def _squeezed(text: str | None) -> str:
    return "".join((text or "").split())


def measure(answerer: Answerer, cases: list[Case], mode: dict) -> tuple[float, float, list[tuple[Case, str | None]]]:
    """Shares of exact and of near-exact answers (spaces aside; similarity from 0.9), and the misses."""
    exact, near, misses = 0, 0, []
    ordered = sorted(cases, key=lambda case: len(case.expected))
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start:start + BATCH]
        limit = max(len(answerer.sp.encode(case.expected)) for case in batch) + SPARE_TOKENS
        for case, answer in zip(batch, answerer([case.prompt + case.prefix for case in batch], mode, limit),
                                strict=True):
            alike = difflib.SequenceMatcher(None, _squeezed(answer), _squeezed(case.expected)).ratio()
            exact += _squeezed(answer) == _squeezed(case.expected)
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
    known = [opener for opener in openers if "{" not in opener]
    unseen = [Case(build_prompt([], question), answer) for question, answer in held]
    rows = [("trained questions, greedy", answerer, trained, GREEDY),
            ("trained questions, sampled", answerer, trained, SAMPLING),
            ("held-out wordings, greedy", answerer, unseen, GREEDY),
            ("follow-ups, greedy", answerer, follow_ups, GREEDY),
            ("follow-ups, sampled", answerer, follow_ups, SAMPLING),
            ("after unrelated history", answerer, history_cases(entries), GREEDY),
            ("prefix: own first clause", answerer, clause_cases(entries), GREEDY),
            ("prefix: own, cut anywhere", answerer, cut_cases(entries), GREEDY),
            ("prefix: foreign", answerer, opened_cases(entries, known), GREEDY),
            ("prefix: foreign, never seen", answerer, opened_cases(entries, UNSEEN_OPENERS), GREEDY),
            *((f"trained questions, {name}", Answerer(copy, sp), trained[::4], GREEDY)
              for name, copy in quantized.items())]
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
