"""What the user should know of a store that was made: sentences on rows, special tokens and the mix."""

from saemill.common.log import counted
from saemill.common.models.special_tokens import WrittenSpecials
from saemill.tokenize.config import TokenizeConfig
from saemill.tokenize.mixing import Mix
from saemill.tokenize.writer import Writer


def notes_on(writer: Writer, specials: WrittenSpecials) -> list[str]:
    """List what the user should know of the rows, and of special tokens that texts write out."""
    return [*_notes(writer), *_special_notes(writer, specials)]


def _special_notes(writer: Writer, specials: WrittenSpecials) -> list[str]:
    """Say what was done with special tokens that texts write out, where any does."""
    if not writer.n_special:
        return []
    done = "read as plain text" if specials.rule == "text" else "read as the token"
    other = "special" if specials.rule == "text" else "text"
    return [
        f"{counted(writer.n_special, 'document')} with a special token written out in the text: {done} "
        f"(--special-tokens-in-text {other} for the other way)."
    ]


def mix_notes(config: TokenizeConfig, mix: Mix) -> list[str]:
    """Say what share of the tokens each of several datasets has, and which one ended the mix."""
    if not config.mix:
        return []
    total, asked = max(1, sum(mix.n_tokens)), sum(mix.shares)
    parts = [
        f"{entry.title} {100 * n / total:.2f}% of the tokens ({100 * entry.share / asked:.2f}% asked)"
        for entry, n in zip(config.mix, mix.n_tokens, strict=True)
    ]
    notes = [f"Mixed: {', '.join(parts)}."]
    if mix.ran_out is not None:
        name, n = config.mix[mix.ran_out].title, mix.n_tokens[mix.ran_out]
        notes.append(
            f"{name} ran out after {n:,} tokens, and there the mix ends, at {total:,} tokens in all."
        )
    return notes


def _notes(writer: Writer) -> list[str]:
    """List what the user should know of the rows."""
    notes = []
    if writer.n_padding:
        notes.append(
            f"{writer.n_padding:,} ids {writer.info.pad_id} at the ends of rows are padding and left out."
        )
    if writer.document == "kept row" and not writer.all_framed[0]:
        own = ", ".join(map(str, writer.info.prefix_ids))
        notes.append(f"Not all rows begin with {own}, as the tokenizer's own would.")
    if writer.held_out_fraction == 0 or any(writer.held_out):
        return notes
    sides = zip(writer.n_tokens, writer.document_held_out, strict=True)
    if n_held := sum(n for n, out in sides if out):
        longest = n_held + writer.ctx_len - writer.row_capacity
        notes.append(
            f"No row is held out: the documents held out have {n_held:,} tokens. Lower --ctx-len to "
            f"{longest} or less, give more text, or assess on another store (`saemill assess --tokens`)."
        )
    else:
        notes.append(
            "No row is held out: no document can be spared from training. Give more text, or assess on "
            "another store (`saemill assess --tokens`)."
        )
    return notes
