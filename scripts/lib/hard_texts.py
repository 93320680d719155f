"""Texts that tokenizers disagree about, written for this project."""

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466"
FLAGS = "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7"

TEXTS = [
    "", " ", "  ", "   ", "\t", "\n", "\r\n", "\r", " \n", "\n ", "a", " a", "a ", "  a  ", "\ta\t",
    "Hello, world!", "hello hello  hello   hello", "The quick brown fox; it jumps -- over 13 lazy dogs.",
    "tabs\tand\t\tmore\t \tmixed", "line\r\nline\r\n\r\nline", "old mac\rline", " \n \n\n  \n   x", "x" + " " * 70 + "y", "\n" * 40, "\t" * 17 + "x",
    "don't I'll WE'VE they'RE it'S 'tis o'clock 's'd'm", "he’s “quoted” — dash…",
    "0 1 12 123 1234 12345 123456789012345678901234567890", "1,234,567.89 -0.5e-10 0xDEADBEEF 3/4 50% $9.99", "٣٤٥ १२३ ༣༤ ０１２ ²³ ½ Ⅻ 一二三",
    "snake_case camelCase PascalCase SCREAMING_CASE kebab-case XMLHttpRequest iPhone15Pro",
    "def f(x: int) -> str:\n    if x >= 10:\n\t\treturn f'{x!r}'  # ok\n", "{\"a\":[1,2,{\"b\":null}],\"c\":\"\\n\"}", "<div class=\"a b\">&amp;</div>", "https://example.org/p?q=1&r=%20#frag",
    "/usr/local/bin:/opt//x ///\n// comment\n/", "a/b//c\n\n/d", "!!!???...,,,;;;:::", "++--**//==<=>=!=&&||^^~~``", "([{<>}])", "\\\\\\ \\n \\t",
    "你好，世界！今天天气很好。", "我有3个苹果和12本书", "你 好 世 界", "日本語のテキスト、カタカナとひらがな。", "漢字かな交じり文123ABC", "안녕하세요 세계 한국어", "㐀㐁𠀀𠀁 rare", "繁體中文與简体中文",
    "Привет, мир! Ёлка и ёжик", "Γειά σου Κόσμε ΣΣς", "שלום עולם", "مرحبا بالعالم ١٢٣", "नमस्ते दुनिया क्षत्रिय", "สวัสดีชาวโลก ภาษาไทย", "ქართული ენა", "ⴰⵎⴰⵣⵉⵖ", "Tiếng Việt có dấu",
    "naïve café déjà-vu Ångström Straße ǅ ﬁ ﬂ", "cafe\u0301 n\u0303 a\u0308\u0323 \u0301alone", "Z\u0351\u036b\u0343a\u0329\u0359lgo\u0317\u0300", "\u1e9b\u0323 \u212b \u2126",
    "\U0001f600", "\U0001f600\U0001f600 \U0001f602", FAMILY, FAMILY * 3 + " x", FLAGS, "\u2764\ufe0f \u261d\U0001f3fd \U0001f3f3\ufe0f\u200d\U0001f308 1\ufe0f\u20e3", "text\U0001f680text \U0001f9d1\u200d\U0001f4bb.",
    "\x00", "a\x00b", "\x01\x02\x03 \x1b[31mred\x1b[0m \x7f \x08", "\x0b\x0c\x1c\x1d\x85", "\u00a0nbsp\u00a0\u00a0x", "\u2003em\u3000ideographic\u2028ls\u2029ps\u200bzw\u200c\u200d\u2060\ufeff", "\u180e\u202a\u202e rtl \u202c", "\ufffd \ufffe \ue000 \U000f0000 \U0010ffff", "\u00ad soft\u00adhyphen",
    "▁", "▁▁ a▁b", "Ġ Ċ ĉ", "<0x0A> <0xE4>", "<unk>", "<s>", "</s>", "<s>a</s>b", "a<s> b </s> c", "<s><s></s></s>", " <s> ", "<s>\n</s>\n", "</ s></s", "x</s", "<note>", "a<note>b <note> c<note>", "<note><s><note>",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>x<|im_end|> <|im_end|>", "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|>", "<|endoftext|><|end_of_text|>", "<|im_start", "|im_end|>", "<<|im_end|>>",
    "[INST] <<SYS>>\nYou help.\n<</SYS>>\n\nHi [/INST] Hello </s><s>[INST] More [/INST]", "### Instruction:\nAdd 2+2.\n\n### Response:\n4",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "abababababababababab", "ABABABAB日AB日", "the theater there then they and hand band", "a" * 700, "é" * 300, "=" * 130, "-" * 81 + "\n", "ha" * 200, "\U0001f600" * 60,
    "One two  three   four    five     six      seven       eight", "x=1;y=2;\n\n\n\tz=3;   \n", "trailing spaces   \nnext   \n   ", "q w e r t y \n u i o p", "Mr. O'Neil-Smith's \"e-mail\": a.b+c@d-e.co.uk",
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.",
]
