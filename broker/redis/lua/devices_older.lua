-- How many places of a partition come before the first device that was registered at a time or later; up to the last
-- device, if all are older.
-- KEYS: the pages. ARGV: times. Answer: for each, 0 to 4096. An entry begins with its time, a double.
-- reads only
-- include pages
local PAGES = 4096 / PAGE
local pages = {}

-- The place of the page's first device from `time` on, or nil; and the place after its last device, or nil.
local function look(number, time)
  pages[number] = pages[number] or read_page(KEYS[1], number)
  local last
  for i = 1, PAGE do
    local entry = entry_of(pages[number], i)
    if entry ~= '' then
      last = number * PAGE + i
      if (struct.unpack('>d', entry)) >= time then return last - 1, last end
    end
  end
  return nil, last
end

local function count_older(time)
  local low, high, answer = 0, PAGES, 0 -- pages below `low` are older, those from `high` on are not, or empty
  while low < high do
    local middle = math.floor((low + high) / 2)
    local number, first, last = middle, look(middle, time)
    while not last and number + 1 < high do
      number = number + 1
      first, last = look(number, time)
    end
    if last and not first then
      low, answer = number + 1, last
    else
      high = middle
      if first then answer = first end
    end
  end
  return answer
end

local answers = {}
for i, time in ipairs(ARGV) do answers[i] = count_older(tonumber(time)) end
return answers
