#!/usr/bin/env python3
"""Makes src/eval/synonyms.txt from WordNet 3.0's database.

    synonyms.py FOLDER > src/eval/synonyms.txt

FOLDER has data.*, index.* and cntlist.rev (Debian: `apt-get download wordnet-base && dpkg -x wordnet-base*.deb DIR`, then
DIR/usr/share/wordnet). A word's synonyms are the other members of the set of its most frequent sense in the tagged texts
(cntlist.rev), the most frequent first, four at most; only single words of three letters or more, and no function words.
"""
import collections
import pathlib
import re
import sys

POS = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}
WORD = re.compile(r"[a-z]{3,}")
# What carries no meaning of its own in a sentence, or another one than WordNet's first.
STOP = set("""about above after again all also and any are because been before being below between both but can could did does
down during each few for from further had has have having her here hers herself him himself his how into its itself just made
may more most much must nor not now off once one only other our ours out over own same she should some such than that the their
them then there these they this those three through too two under until very was well were what when where which while who
whom why will with would you your four five six seven eight nine ten zero many how""".split())
LICENCE = """# Synonyms from WordNet 3.0: of each word's most frequent sense, the most frequent first. Made by scripts/synonyms.py.
#
# WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved. Permission to use, copy, modify and distribute this
# database for any purpose and without fee or royalty is granted, provided that this notice appears on all copies. It is provided
# "as is"; Princeton University makes no representations or warranties, express or implied. The name of Princeton University may
# not be used in advertising or publicity pertaining to distribution of it.
"""


def main():
    folder = pathlib.Path(sys.argv[1])
    # The offset of a sense is found by the order of senses in index.*, which cntlist.rev numbers.
    counts = collections.defaultdict(dict)
    for line in (folder / "cntlist.rev").read_text().splitlines():
        key, number, count = line.split()
        lemma, rest = key.split("%")
        counts[lemma][POS[rest[0]], int(number)] = int(count)
    sets = {}
    for pos in set(POS.values()):
        for line in (folder / f"data.{pos}").read_text().splitlines():
            if not line.startswith("  "):
                fields = line.split()
                size = int(fields[3], 16)
                words = [fields[4 + 2 * k].split("(")[0] for k in range(size)]
                sets[pos, fields[0]] = words
    senses = {}
    for pos in set(POS.values()):
        for line in (folder / f"index.{pos}").read_text().splitlines():
            if not line.startswith("  "):
                fields = line.split()
                offsets = fields[-int(fields[2]):]
                senses[fields[0], pos] = offsets

    def frequency(word, offset_of):
        return max((count for (pos, number), count in counts[word].items()
                    if senses.get((word, pos), [])[number - 1:number] == [offset_of[1]] and pos == offset_of[0]), default=0)

    print(LICENCE, end="")
    for word in sorted(counts):
        if not WORD.fullmatch(word) or word in STOP:
            continue
        # Of equals the first part of speech by name, so that the file is always the same.
        (pos, number), count = max(counts[word].items(), key=lambda found: (found[1], found[0][0], -found[0][1]))
        offsets = senses.get((word, pos), [])
        if count < 1 or number > len(offsets):
            continue
        of = (pos, offsets[number - 1])
        others = {other for other in sets[of] if other != word and WORD.fullmatch(other) and other not in STOP}
        ranked = sorted(others, key=lambda other: (-frequency(other, of), other))[:4]
        if ranked:
            print(word, *ranked)


if __name__ == "__main__":
    main()
