"""What quantized weights change in a whole model's predictions, as Markdown; beside llama.cpp's formats.

    python -m benchmarks.quantization [--layers 2]

THUDM/demo on the questions and answers of tools/demo_texts: perplexity of both, and the mean KL divergence of the next
token's distribution from the float32 model's, in nats. And layers of ChatGLM2-6B's real size with random
weights, on random ids: KL alone, since no text is likelier than another there. "weights": exact activations, so that
only the format counts; "kernels": as the CPU computes it, with activations in int8, keys and values in float16. Every
linear layer is quantized, the output matrix too, except where a line says otherwise.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from benchmarks.formats import ours, q4_0, q8_0
from benchmarks.random_model import make_random_model
from server.core import Message
from server.engine.kv_cache import KVCache
from server.kernels.cpu_ops import CpuOps
from server.kernels.ops import Ops
from server.kernels.quantize import GROUP_SIZE
from server.kernels.torch_ops import TorchOps
from server.models.base import ForwardBatch, Segment
from server.models.loader import LoadedModel, load_model
from tools.demo_data import load_entries

DEMO = Path(__file__).resolve().parent.parent / "THUDM" / "demo"
RoundTrip = Callable[[torch.Tensor], torch.Tensor]
BitsOfRow = Callable[[int], float]  # what so many weights of a row take
OUTPUT = "output_layer"


class Format(NamedTuple):
    there_and_back: RoundTrip
    bits_of_row: BitsOfRow


class Text(NamedTuple):
    """Token ids, of which those from ``begin`` on are predicted."""

    ids: list[int]
    begin: int


class Prediction(NamedTuple):
    """Of all texts: log probabilities [tokens, vocab], and the tokens that came."""

    log_probabilities: torch.Tensor
    ids: torch.Tensor

    def perplexity(self) -> float:
        return math.exp(-self.log_probabilities.gather(1, self.ids.unsqueeze(1)).mean())

    def divergence(self, exact: Prediction) -> float:
        """Mean KL divergence from ``exact``, nats."""
        p, q = exact.log_probabilities.double(), self.log_probabilities.double()
        return float((p.exp() * (p - q)).sum(1).mean())


def load(folder: Path, ops: Ops, bits: int = 16) -> LoadedModel:
    return load_model(folder, dtype=torch.float32, device="cpu", bits=bits, ops=ops)


def changed(folder: Path, there_and_back: RoundTrip, output: RoundTrip) -> LoadedModel:
    """The float32 model with its matrices as a format gives them back; ``output`` for the output matrix."""
    model = load(folder, TorchOps())
    for name, module in model.network.named_modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_((output if name.endswith(OUTPUT) else there_and_back)(module.weight))
    return model


def bits_per_weight(model: LoadedModel, layers: BitsOfRow, output: BitsOfRow) -> float:
    """Mean over all matrices."""
    size = bits = 0.0
    for name, module in model.network.named_modules():
        if isinstance(module, nn.Linear):
            rows, columns = module.weight.shape
            size += rows * columns
            bits += rows * (output if name.endswith(OUTPUT) else layers)(columns)
    return bits / size


def variants(folder: Path, threads: int) -> Iterator[tuple[str, float, LoadedModel]]:
    """(name, bits per weight, model)."""
    exact = load(folder, TorchOps())
    yield "float32", 32, exact
    q4, q8 = Format(q4_0, lambda columns: 4.5 * columns), Format(q8_0, lambda columns: 8.5 * columns)
    # 8 bits for each group's scale, and 32 for the row's
    int4 = Format(lambda w: ours(w, 4), lambda columns: 4 * columns + 8 * math.ceil(columns / GROUP_SIZE[4]) + 32)
    int8 = Format(lambda w: ours(w, 8), lambda columns: 8 * columns + 16 * math.ceil(columns / GROUP_SIZE[8]))
    rows = [
        ("llama.cpp Q4_0, weights", q4, q4),
        ("llama.cpp Q4_0, output matrix Q8_0, weights", q4, q8),
        ("**int4 here**, weights", int4, int4),
        ("**int4 here**, output matrix int8, weights", int4, int8),
        ("**int4 here**, kernels", int4, int4),
        ("llama.cpp Q8_0, weights", q8, q8),
        ("**int8 here**, weights", int8, int8),
        ("**int8 here**, kernels", int8, int8),
    ]
    for name, layers, output in rows:
        bits = bits_per_weight(exact, layers.bits_of_row, output.bits_of_row)
        if name.endswith("kernels"):
            yield name, bits, load(folder, CpuOps(threads), 4 if layers is int4 else 8)
        else:
            yield name, bits, changed(folder, layers.there_and_back, output.there_and_back)


@torch.inference_mode()
def predict(model: LoadedModel, texts: list[Text]) -> Prediction:
    shape, found, ids = model.network.kv_shape, [], []
    cache = KVCache(shape, 1, max(len(text.ids) for text in texts), model.kv_dtype, "cpu")
    for text in texts:
        rows = torch.arange(text.begin - 1, len(text.ids) - 1)
        batch = ForwardBatch(torch.tensor(text.ids), [Segment(0, 0, len(text.ids))], rows)
        found.append(model.network.forward(batch, cache).log_softmax(-1))
        ids += text.ids[text.begin :]
    return Prediction(torch.cat(found), torch.tensor(ids))


def demo_texts(model: LoadedModel) -> list[Text]:
    """Each of the demo's first questions with its answer, as one text: answers alone it knows by heart."""
    family, tokenizer, texts = model.family, model.tokenizer, []
    end = min(family.stop_ids(tokenizer))
    for entry in load_entries():
        first = entry.dialogues[0][0]
        prompt = family.build_prompt(tokenizer, [Message("user", first.questions[0])])
        texts.append(Text([*prompt, *tokenizer.encode(first.answer), end], 2))
    return texts


def random_texts(model: LoadedModel) -> list[Text]:
    generator = torch.Generator().manual_seed(0)
    return [Text(torch.randint(300, 1500, (65,), generator=generator).tolist(), 1) for _ in range(4)]


def table(folder: Path, texts: Callable[[LoadedModel], list[Text]], threads: int, *, perplexity: bool) -> None:
    print("| format | bits per weight | KL, nats |" + (" perplexity |" if perplexity else ""))
    print("|---|---|---|" + ("---|" if perplexity else ""))
    exact = given = None
    for name, bits, model in variants(folder, threads):
        given = given or texts(model)
        found = predict(model, given)
        exact = exact or found
        cells = [name, f"{bits:.4g}", f"{found.divergence(exact):.2e}"]
        print(f"| {' | '.join(cells + [f'{found.perplexity():.4f}'] * perplexity)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="layers of the random model, 0.8 GB each in float32")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print("\nTHUDM/demo\n")
    table(DEMO, demo_texts, args.threads, perplexity=True)
    with tempfile.TemporaryDirectory() as folder:
        make_random_model("chatglm2-6b", Path(folder) / "random", layers=args.layers)
        print(f"\n{args.layers} layers of ChatGLM2-6B's size, random weights\n")
        table(Path(folder) / "random", random_texts, args.threads, perplexity=False)


if __name__ == "__main__":
    main()
