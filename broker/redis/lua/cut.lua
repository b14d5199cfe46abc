-- Takes the live part out of a row. KEYS: <tag>:row.
-- repeatable
-- include rows
cut_row(KEYS[1])
return 1
