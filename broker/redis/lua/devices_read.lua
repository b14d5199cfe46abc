-- The entries of some devices of a partition.
-- KEYS: the pages. ARGV: places within the partition. Answer: their entries, '' where there is no device.
-- reads only
-- include pages
local pages, found = {}, {}
for i, place in ipairs(ARGV) do
  local number = math.floor(place / PAGE)
  if not pages[number] then pages[number] = read_page(KEYS[1], number) end
  found[i] = (entry_of(pages[number], place % PAGE + 1))
end
return found
