"""The tokenizer of `tiny-ldm`: WordPiece over the words of reports, and letters for all others."""

from __future__ import annotations

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TOKENS = 32  # of a text, [CLS] and [SEP] included
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = """
    a acute airspace and arterial at base bilateral both calcified chest clear consolidation
    contrast density effusion enhanced finding findings fluid focal in is large left lesion
    lesions lobe lobes lower lung lungs mass medium middle moderate multiple no nodule
    nodules normal of on one opacity phase pleural pneumonia portal right scan seen side
    small solitary solid the there two upper venous with without
""".split()  # noqa: SIM905


def tokenizer() -> Tokenizer:
    """BERT's normalisation and splitting, padded and cut to TOKENS."""
    letters = string.ascii_lowercase + string.digits
    vocabulary = [*SPECIAL, *WORDS, *(c for c in letters if c not in WORDS), *".,:;-+/()'%"]
    vocabulary += [f"##{c}" for c in letters] + ["##s", "##es", "##ed"]
    numbers = {token: i for i, token in enumerate(dict.fromkeys(vocabulary))}
    made = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, numbers[token]) for token in ("[CLS]", "[SEP]")],
    )
    made.enable_padding(pad_id=0, pad_token="[PAD]", length=TOKENS)
    made.enable_truncation(TOKENS)
    return made
