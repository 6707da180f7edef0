"""The tokenizer of `tiny-ldm`: WordPiece of the reports' words, single letters for all others."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TOKENS = 32  # length of a text, including [CLS] and [SEP]
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = """
    a acute airspace and arterial at base bilateral both calcified chest clear consolidation
    contrast density effusion enhanced finding findings fluid focal in is large left lesion
    lesions lobe lobes lower lung lungs mass medium middle moderate multiple no nodule
    nodules normal of on one opacity phase pleural pneumonia portal right scan seen side
    small solitary solid the there two upper venous with without
""".split()  # noqa: SIM905


def tokenizer() -> Tokenizer:
    """Return a tokenizer that normalises and splits like BERT's and pads or cuts to TOKENS."""
    letters = string.ascii_lowercase + string.digits
    vocabulary = [*SPECIAL, *WORDS, *(c for c in letters if c not in WORDS), *".,:;-+/()'%"]
    vocabulary += [f"##{c}" for c in letters] + ["##s", "##es", "##ed"]
    numbers = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    result = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    result.normalizer = normalizers.BertNormalizer(lowercase=True)
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.decoder = decoders.WordPiece()
    result.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, numbers[token]) for token in ("[CLS]", "[SEP]")],
    )
    result.enable_padding(pad_id=0, pad_token="[PAD]", length=TOKENS)
    result.enable_truncation(TOKENS)
    return result
