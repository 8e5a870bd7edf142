"""The strings that tokenizer implementations are known to part on, by kind: data of ``conformance``."""

from __future__ import annotations

SCRIPTS = (
    "The quick brown fox can't jump over 13 lazy dogs' beds; they'll sleep, I'm sure.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. STRASSE, Straße, ẞ",
    "Voilà l'été: où est-ce qu'on déjeune, cœur à cœur, chez Noël? L'œuvre d'Ève.",
    "El pingüino comió jalapeños en España; ¿qué más? ¡Nada!",
    "À noite, vovô Kowalsky vê o ímã cair no pé do pinguim queixoso.",
    "Perché l'università è così lontana? Può darsi che sia già tardi.",
    "Þórður, sækið ykkur hæfa menn; Årets ål är så gott på øen.",
    "Zażółć gęślą jaźń. Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Iğdır'ın ışığı: İSTANBUL, istanbul, ıI iİ. Pijamalı hasta yağız şoföre çabucak güvendi.",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Їжак, ґанок, Ўсё.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία. Ὦ ξεῖν᾽, ἀγγέλλειν Λακεδαιμονίοις. ΣΑΣ σας",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر، أليس كذلك؟ ١٢٣",
    "اَلْعَرَبِيَّةُ لُغَةٌ جَمِيلَةٌ می‌خواهم گچ پژ ۴۵۶",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה. שָׁלוֹם עֲלֵיכֶם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश। क्षत्रिय, ज्ञान, १२३",
    "আমি বাংলায় গান গাই। দ্বিতীয়, স্বাস্থ্য",
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல் இனிதாவது எங்கும் காணோம்",
    "తెలుగు భాష చాలా అందమైనది. ಕನ್ನಡ ನಾಡು. മലയാളം ചില്ല് ർ ൽ ൾ",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า กว่าบรรดาฝูงสัตว์เดรัจฉาน ๑๒๓",
    "ພາສາລາວ ភាសាខ្មែរ ကျွန်တော် မြန်မာစာ བོད་ཡིག",
    "视野无限广,窗外有蓝天。微风拂面,“你好”——他说:价格是3.5元!",
    "視野無限廣,窗外有藍天。臺灣、香港、澳門",
    "いろはにほへと ちりぬるを。東京タワーは333mです。コーヒーを飲みますか?ガギグゲゴ",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다. 한글 ㄱㄴㄷ ㅋㅋㅋ",
    "Trăm năm trong cõi người ta, chữ tài chữ mệnh khéo là ghét nhau. Đường ở đâu?",
    "საქართველო Հայաստան ኢትዮጵያ ᏣᎳᎩ ᐃᓄᒃᑎᑐᑦ ⵜⴰⵎⴰⵣⵉⵖⵜ",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒎𝒂𝒕𝒉 𝟙𝟚𝟛 𐍈𐌰𐌿 𓀀𓂀 𠜎𠜱 𝄞",
    "fullwidth \uff21\uff22\uff23 \uff11\uff12\uff13\uff0c\uff01\uff5e "
    "half \uff76\uff80\uff76\uff85\uff9e \u3314 \u337f \u2460 \xbd \xb2 \u338f \ufb01 \ufb04 \u017f",
)

EMOJI = (
    "🙂",
    "😀😃😄",
    "👍🏻👍🏼👍🏽👍🏾👍🏿",
    "👩‍👩‍👧‍👦 family 👨‍💻",
    "🏳️‍🌈 🏴‍☠️ 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "🇩🇪🇫🇷🇯🇵🇧🇷 🇺🇸",
    "❤️ ❤ ☺︎ ☺️ ✌🏽",
    "1️⃣2️⃣ #️⃣ *️⃣ ©️",
    "great👏job👏everyone",
    "🤦🏼‍♂️, seriously?!",
    "🧑🏽‍🚀🪐 to the 🌙!",
    "¯\\_(ツ)_/¯ (╯°□°)╯︵ ┻━┻",
)

COMBINING = (
    "e\u0301 a\u0308 n\u0303 c\u0327 o\u0323\u0302",
    "q\u0323\u0307 q\u0307\u0323",
    "Z\u0351\u036b\u0343\u036a\u0302a\u0322\u0353l\u0329\u0356g\u0321o\u0347",
    "\u0301leading mark",
    "a \u0301b",
    "x\u20d7 y\u0305 1\u0338",
    "\u1112\u1161\u11ab\u1100\u1173\u11af",
    "\u0915\u094d\u0937 \u0915\u094d\u200d\u0937 \u0915\u094d\u200c\u0937",
    "\u0e01\u0e33 \u0e40\u0e01\u0e49\u0e32",
    "\u05e9\u05c1\u05b8 \u05e9\u05b8\u05c1",
    "I\u0307 i\u0307 \u0130",
    "A\u030a \u212b \u00c5 \u2126 \u03a9 \u212a K",
)

COMPOSED = (
    "\u00e9\u00e8\u00ea\u00eb \u00f1 \u00fc\u00df \u01d6 \u1e69 \u1ec7",
    "\u03ac \u1fb3 \u1f82 \u0419 \u0439 \u0457",
    "\uac00\ub098\ub2e4 \u3071\u3070 \u304c \u30d1",
    "\ufb01 \ufb03 \u2460 \u00bd \u2075 \u2122 \ufdfa \u3392",
    "\u0929 \u0931 \u0958 \u09dc \u0dda \u0f43",
    "\U0002f800 \uf900 \u2f00 \u8c48",
    "\u00c5ngstr\u00f6m na\u00efve co\u00f6perate fa\u00e7ade r\u00e9sum\u00e9",
)

CODE = (
    "def f(x: int = 0) -> list[int]:\n    return [i**2 for i in range(x) if i % 3 != 0]\n",
    'print(f"{value!r:>10}", end="\\n")  # noqa',
    "class A(B):\n\n\tdef __init__(self, *args, **kwargs):\n\t\tsuper().__init__(*args, **kwargs)\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] << 2 & 0xFFu; }",
    "const f = async ({a, b = 1, ...rest}) => (await g(a))?.b ?? `x${b}`;",
    "SELECT a.*, COUNT(*) AS n FROM t1 a LEFT JOIN t2 b ON a.id = b.id WHERE a.x <> 'it''s' GROUP BY 1;",
    "fun <T : Any> List<T>.second(): T? = if (size > 1) this[1] else null",
    '#!/bin/sh\nset -eu; for f in *.txt; do sed -e \'s/a\\b/c/g\' "$f" | cut -f1 > "$f.out"; done',
    '{"a": [1, 2.5e-3, null, true], "b": {"c": "\\u00e9\\n"}}',
    "<div class='a b' id=x><!-- c --><p>a &amp; b &lt; c</p></div>",
    "template <typename... Ts> auto sum(Ts&&... ts) { return (ts + ...); }",
    "\\begin{align} E &= mc^2 \\\\ \\int_0^\\infty e^{-x^2}\\,dx &= \\frac{\\sqrt{\\pi}}{2} \\end{align}",
    "| a | b |\n|---|:-:|\n| `x` | **y** |\n\n- [ ] todo\n  1. one\n> quote\n```py\npass\n```",
    "x=1;y=-2;z=x--y;w=!x&&~y||z>>>3;i+++j",
    "camelCaseWord snake_case_word SCREAMING_SNAKE kebab-case-word Pascal2Case v1.2.3-rc.1+build",
    "if(a){b()}else{c()}//d/*e*/",
    "            deeply = indented\n        less = indented\n",
    "\t\tmixed    tabs \t and spaces\t\n",
)

CONTRACTIONS = (
    "I'm you're he's we'd they'll I've it's can't o'clock",
    "I'M YOU'RE HE'S WE'D THEY'LL I'VE IT'S CAN'T",
    "I’m you’re he’s can’t ’tis ‘quoted’ “double” «guillemets» „low“",
    "'s 't 're 've 'm 'll 'd 'S 'LL",
    "rock 'n' roll, the '90s, dogs' 's",
    "aujourd'hui l'homme d'été qu'il",
    "x's y'all'd've shouldn't've",
)

PUNCTUATION = (
    "Hello, world! (yes?) [no]; {maybe}: <ok>",
    "...!!!???,,,;;;:::",
    "--- === *** ### ~~~ ___ +++ <<<>>>",
    "a.b,c;d:e!f?g/h\\i|j@k#l$m%n^o&p*q",
    "— – ‒ ― … ‥ · • ‣ § ¶ † ‡ ‰ ′ ″",
    "€5 £6 ¥7 ₹8 ₿9 ₽10 ¢ ¤",
    "、。「」『』【】〜・!?",
    "→ ⇒ ∀x∈ℝ: ∃y ≤ √x ± ∞ ∑∏∫ ≈ ≠ ⊂ ∅ ¬p ∧ q",
    "╔═╗║ ╚═╝ ░▒▓█ ▁▂▃ ■□●○★☆",
    '"quoted" \'single\' `back` ´acute´ "',
)

URLS = (
    "https://www.example.com/path/to/page.html?query=a%20b&x=1#frag",
    "http://user:pw@[2001:db8::1]:8080/~x/;p=1",
    "mailto:first.last+tag@sub.example.co.uk",
    "C:\\Users\\me\\My Documents\\file (1).txt",
    "/usr/local/lib/python3.11/site-packages/__init__.py:42:",
    "192.168.0.1/24 fe80::1%eth0 00:1A:2b:3C",
    "git@github.com:owner/repo.git ftp://ftp.example.org",
    "https://例え.テスト/パス?キー=値",
    "@handle #hashtag #日本語 $TSLA v2.0",
)

CONTROL = (
    "",
    "a\x00b",
    "\x00",
    "bell\x07 back\x08 esc\x1b[31mred\x1b[0m del\x7f",
    "\x01\x02\x03\x04\x0e\x1f",
    "\ufeffbom at the start",
    "bom\ufeffinside",
    "zero\u200bwidth\u200cnon\u200djoiner\u2060word",
    "soft\u00adhyphen",
    "\u202eright to left\u202c \u200emark\u200f \u2066iso\u2069",
    "replacement \ufffd char",
    "private \ue000 use \U000f0000",
    "noncharacter \uffff \ufdd0 \U0010ffff",
    "unassigned \u0378 \U000e0fff",
    "tag\U000e0041\U000e0042 variation\ufe0f\U000e0100",
    "line\u2028separator paragraph\u2029separator next\u0085line",
    "annotation \ufff9a\ufffab\ufffb object \ufffc",
)

LOOKALIKES = (
    "<s> </s> <pad> <unk> <mask> [CLS] [SEP] [PAD] [UNK] [MASK]",
    "<|endoftext|> <|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "[INST] <<SYS>>\nbe brief\n<</SYS>>\n\nhi [/INST]",
    "<0x0A> <0xE2> \u2581\u2581word \u2581 Ġword Ċ ##ing @@ </w>",
    "<|user|> <|assistant|> <think> </think> <tool_call>",
)

NUMBER_FORMS = (
    "{0}",
    "{0:,}",
    "{0:_}",
    "-{0}",
    "+{0}%",
    "${0}.99",
    "{0:x}",
    "0x{0:08X}",
    "0b{0:b}",
    "{0:e}",
    "1.{0}e-12",
    "{0}th of May",
    "v{0}.0.1",
    "a{0}b{0}c",
    "{0}kg/m²",
    "({0})",
    "№{0}",
)

SPACES = (
    " ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\x0b",
    "\x0c",
    "\x1c",
    "\x85",
    "\xa0",
    "\u1680",
    "\u2003",
    "\u2009",
    "\u200a",
    "\u2028",
    "\u202f",
    "\u205f",
    "\u3000",
)

BY_KIND: dict[str, tuple[str, ...]] = {
    "scripts": SCRIPTS,
    "emoji": EMOJI,
    "combining-marks": COMBINING,
    "code": CODE,
    "contractions": CONTRACTIONS,
    "punctuation": PUNCTUATION,
    "urls-and-paths": URLS,
    "control-characters": CONTROL,
    "lookalikes": LOOKALIKES,
}
"""The written samples, by the name under which a mismatch is reported."""
