"""The 100 classes of glyphs100 and their six natural groups.

Look-alikes across alphabets (Latin A, Greek Alpha, Cyrillic A) are in once only, and of letters
whose two cases differ in size alone (c, s, u, v, w, x, z) one case is in.
"""

from __future__ import annotations

_GREEK = (
    "Γ Gamma, Δ Delta, Λ Lambda, Ξ Xi, Π Pi, Σ Sigma, Φ Phi, Ψ Psi, Ω Omega, "
    "α alpha, β beta, γ gamma, δ delta, ε epsilon, λ lambda, μ mu, ξ xi, ω omega"
)
_CYRILLIC = (
    "Б Be, Д De, Ж Zhe, И I, Л El, У U, Ц Tse, Ч Che, Ш Sha, Ъ hard sign, "
    "Ы Yery, Э E, Ю Yu, Я Ya, Ђ Dje, Љ Lje"
)
_SYMBOLS = (
    "! exclamation, ? question, & ampersand, @ at, # hash, $ dollar, % percent, + plus, = equals, "
    "* asterisk, < less, > greater, ~ tilde, € euro, £ pound, § section, ∞ infinity, √ root"
)


def _named(table: str, prefix: str = "") -> list[tuple[str, str]]:
    return [(entry[0], prefix + entry[2:]) for entry in table.split(", ")]


GROUPS: dict[str, list[tuple[str, str]]] = {
    "digit": [(c, c) for c in "0123456789"],
    "Latin upper": [(c, c) for c in "ABCDEFGHJKLMNPQRSTWX"],
    "Latin lower": [(c, c) for c in "abdefghijkmnqrtuvz"],
    "Greek": _named(_GREEK),
    "Cyrillic": _named(_CYRILLIC, "Cyr. "),
    "symbol": _named(_SYMBOLS),
}
COARSE_NAMES = tuple(GROUPS)
CHARACTERS = "".join(char for members in GROUPS.values() for char, _ in members)
CLASS_NAMES = tuple(name for members in GROUPS.values() for _, name in members)
COARSE_OF_CLASS = tuple(g for g, members in enumerate(GROUPS.values()) for _ in members)
