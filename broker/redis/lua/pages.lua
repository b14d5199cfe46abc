-- Device pages. To be included. A page is 32 entries; first their lengths, 3 bytes each (0: no device), then the
-- entries. Field i of the hash has the devices from 32 i on, counted within the partition.
local PAGE = 32
local LENGTHS = '>' .. string.rep('I3', PAGE)
local HEAD = 3 * PAGE
local NO_PAGE = string.rep('\0', HEAD)

local function read_page(key, number)
  local page = redis.call('HGET', key, number) or NO_PAGE
  return { lengths = { struct.unpack(LENGTHS, page) }, entries = string.sub(page, HEAD + 1) }
end

local function write_page(key, number, page)
  local lengths = struct.pack(LENGTHS, unpack(page.lengths, 1, PAGE))
  redis.call('HSET', key, number, lengths .. page.entries)
end

-- The i-th, from 1, and how many bytes are before it.
local function entry_of(page, i)
  local at = 0
  for k = 1, i - 1 do at = at + page.lengths[k] end
  return string.sub(page.entries, at + 1, at + page.lengths[i]), at
end

local function put_entry(page, i, entry)
  local before, at = entry_of(page, i)
  page.entries = string.sub(page.entries, 1, at) .. entry .. string.sub(page.entries, at + #before + 1)
  page.lengths[i] = #entry
end
