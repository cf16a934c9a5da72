# Doxygen's input filter: the headers' plain comments become its own, layout kept. A block's first
# paragraph is the brief, the rest stands as written; a comment behind code documents what it follows.
# SPDX-License-Identifier: Apache-2.0
function text(line) { sub(/^ *[*] ?/, "", line); return line }
function finish() { if (verbatim) print "@endverbatim"; print "*/"; inside = verbatim = 0 }

!inside && /^\/\*.*\*\/$/ { sub(/^\/\*/, "/**"); print; next }
!inside && /^\/\*/ {
    inside = 1
    print NR == 1 ? "/** @file" : "/**"
    line = substr($0, 3)
    sub(/^ /, "", line)
    if (line != "") print line
    next
}
inside {
    last = sub(/ *\*\/$/, "")
    line = text($0)
    if (line == "" && !verbatim && !last) { print "\n@verbatim"; verbatim = 1 }
    else if (line !~ /^SPDX/) print line
    if (last) finish()
    next
}
{ gsub(/\/\* /, "/**< "); print }
