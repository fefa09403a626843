"""CodeGeeX2's language tags: the comment that stands above code and says which language it is in.

Names and forms are those of THUDM/CodeGeeX2, demo/fastapicpu.py and evaluation/utils.py.
"""

from __future__ import annotations

import difflib

_FORMS = {
    "# language: {}": (
        "CMake, CoffeeScript, Dockerfile, Elixir, GDScript, Julia, Literate CoffeeScript, Makefile, Maple, Perl, "
        "PowerShell, Python, R, RMarkdown, Ruby, Shell, SPARQL, TCSH, YAML"
    ),
    "// language: {}": (
        "ActionScript, ANTLR, Augeas, AWK, Bluespec, C, C#, C++, Cobol, Cuda, Dart, F#, GLSL, Go, Groovy, Java, "
        "Java Server Pages, JavaScript, Kotlin, Lua, Mathematica, Objective-C, Objective-C++, Pascal, PHP, "
        "Protocol Buffer, Rust, Scala, Solidity, Stan, swift, SystemVerilog, TypeScript, Verilog, Zig"
    ),
    "-- language: {}": "Ada, Agda, AppleScript, Elm, Haskell, Idris, Lean, Literate Agda, SQL, VHDL",
    "; language: {}": "Assembly, Clojure, Common Lisp, Emacs Lisp, Lisp, Racket, Scheme",
    "% language: {}": "Erlang, Matlab, Prolog, TeX",
    "<!--language: {}-->": "HTML, Markdown, Vue, XSLT",
    "/* language: {} */": "Alloy, CSS, Thrift",
    "* language: {}": "Abap, SAS, Stata",
    "' language: {}": "Basic, Excel, Visual Basic",
    "(*language: {}*)": "Isabelle, OCaml",
    "(*language:{}*)": "Standard ML",
    "'' language: {}": "Smalltalk",
    "{{language: {}}}": "Delphi",
    "!language: {}": "Fortran",
    ".. language: {}": "reStructuredText",
    "> language: {}": "Literate Haskell",
}
_OTHER_SPELLINGS = {
    "cpp": "C++", "c-sharp": "C#", "csharp": "C#", "CUDA": "Cuda", "f-sharp": "F#", "js": "JavaScript",
    "objectivec": "Objective-C", "Swift": "swift", "vb": "Visual Basic",
}  # fmt: skip


def _key(name: str) -> str:
    return name.lower().replace(" ", "-")


_TAGS = {name: form.format(name) for form, names in _FORMS.items() for name in names.split(", ")}
_TAGS |= {spelling: _TAGS[name] for spelling, name in _OTHER_SPELLINGS.items()}
_NAMES = {_key(name): name for name in _TAGS}
SPELLINGS = sorted({*_TAGS, *_NAMES}, key=str.lower)


def language_tag(name: str) -> str | None:
    """The tag of a language; upper or lower case, and a hyphen for a space, make no difference."""
    known = _NAMES.get(_key(name))
    return None if known is None else _TAGS[known]


def near(name: str) -> list[str]:
    """Names that look like this one, the likeliest first."""
    return [_NAMES[key] for key in difflib.get_close_matches(_key(name), _NAMES, n=3)]
