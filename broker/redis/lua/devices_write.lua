-- Change devices of one partition, with the posting pieces and alias digests that follow from them: all or nothing.
-- May be repeated.
-- KEYS: the pages, the posting pieces, the alias digests. ARGV: msgpack of
--   1: place, entry as it was ('': none), entry as it is to be, …
--   2: term, places it holds for from now on, places it holds for no more, …   places: two bytes each, low one first
--   3: place, digest, …   8 bytes each, zeros: no alias
-- and maybe a mark of the call: then what is there already counts as written by it only if the mark is, too.
-- Answer: 0, or else the places + 1 of those devices that are not as they were: then nothing was changed.
--
-- A piece is a list of up to 255 places in order, or one bit for each of the 4,096, low bits first: then it has 512
-- bytes. To change few places costs a copy of the string for each; many are changed in a table of the bytes.
-- repeatable
-- include pages
local BITS, FEW = 512, 24
local NOTHING = string.rep('\0', BITS)

local function each(places, act)
  for i = 1, #places, 2 do
    local low, high = string.byte(places, i, i + 1)
    act(low + 256 * high)
  end
end

local function code(place)
  return string.char(place % 256, math.floor(place / 256))
end

local function change_bit(piece, place, on)
  local i, mask = math.floor(place / 8) + 1, bit.lshift(1, place % 8)
  local byte = string.byte(piece, i)
  if (bit.band(byte, mask) ~= 0) == on then return piece end
  return string.sub(piece, 1, i - 1) .. string.char(bit.bxor(byte, mask)) .. string.sub(piece, i + 1)
end

local function change_list(list, place, on)
  local low, high = 0, #list / 2
  while low < high do
    local middle = math.floor((low + high) / 2)
    local a, b = string.byte(list, 2 * middle + 1, 2 * middle + 2)
    if a + 256 * b < place then low = middle + 1 else high = middle end
  end
  local same = string.sub(list, 2 * low + 1, 2 * low + 2) == code(place)
  if same == on then return list end
  local rest = string.sub(list, 2 * low + (same and 3 or 1))
  return string.sub(list, 1, 2 * low) .. (on and code(place) or '') .. rest
end

local function set_all(bytes, places)
  each(places, function(place)
    local i = math.floor(place / 8) + 1
    bytes[i] = bit.bor(bytes[i], bit.lshift(1, place % 8))
  end)
  return bytes
end

local function bytes_of(piece)
  if #piece == BITS then return { string.byte(piece, 1, BITS) } end
  return set_all({ string.byte(NOTHING, 1, BITS) }, piece)
end

local function count_ones(bytes)
  local count = 0
  for i = 1, BITS do
    local byte = bytes[i]
    while byte ~= 0 do
      byte = bit.band(byte, byte - 1)
      count = count + 1
    end
  end
  return count
end

local function piece_of(bytes)
  if count_ones(bytes) > 255 then return string.char(unpack(bytes)) end
  local codes = {}
  for i = 1, BITS do
    if bytes[i] ~= 0 then
      for j = 0, 7 do
        if bit.band(bytes[i], bit.lshift(1, j)) ~= 0 then codes[#codes + 1] = code(8 * i - 8 + j) end
      end
    end
  end
  return table.concat(codes)
end

local function change_many(piece, on, off)
  local bytes = bytes_of(piece)
  each(off, function(place)
    local i = math.floor(place / 8) + 1
    bytes[i] = bit.band(bytes[i], bit.bnot(bit.lshift(1, place % 8)))
  end)
  return piece_of(set_all(bytes, on))
end

local function change_piece(piece, on, off)
  if #on + #off > 2 * FEW then return change_many(piece, on, off) end
  local change = #piece == BITS and change_bit or change_list
  each(off, function(place) piece = change(piece, place, false) end)
  each(on, function(place)
    piece = change(piece, place, true)
    if #piece == BITS and change == change_list then -- one more than a list takes
      piece = string.char(unpack(set_all({ string.byte(NOTHING, 1, BITS) }, piece)))
      change = change_bit
    end
  end)
  return piece
end

local devices, terms, digests = unpack(cmsgpack.unpack(ARGV[1]))
local pages, differ = {}, {}

local function by(place)
  return KEYS[1] .. ':by:' .. place
end

for i = 1, #devices, 3 do
  local place = devices[i]
  local number, index = math.floor(place / PAGE), place % PAGE + 1
  pages[number] = pages[number] or read_page(KEYS[1], number)
  local now = entry_of(pages[number], index)
  local mine = now == devices[i + 2] and (not ARGV[2] or redis.call('GET', by(place)) == ARGV[2])
  if now ~= devices[i + 1] and not mine then differ[#differ + 1] = place + 1 end
end
if #differ > 0 then return differ end
for i = 1, #devices, 3 do
  put_entry(pages[math.floor(devices[i] / PAGE)], devices[i] % PAGE + 1, devices[i + 2])
  if ARGV[2] then redis.call('SET', by(devices[i]), ARGV[2], 'PX', 60000) end
end
for number, page in pairs(pages) do write_page(KEYS[1], number, page) end
for i = 1, #terms, 3 do
  local before = redis.call('HGET', KEYS[2], terms[i]) or ''
  local after = change_piece(before, terms[i + 1], terms[i + 2])
  if after == '' or after == NOTHING then
    redis.call('HDEL', KEYS[2], terms[i])
  elseif after ~= before then
    redis.call('HSET', KEYS[2], terms[i], after)
  end
end
for i = 1, #digests, 2 do
  redis.call('SETRANGE', KEYS[3], 8 * digests[i], digests[i + 1])
end
return 0
