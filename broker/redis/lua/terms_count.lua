-- Counts for how many devices of which place a term holds. To be included, after buckets.
-- KEYS: base of the buckets. ARGV: term, place, change, term, place, change, …
-- Answer: for each, 1 if the term counts as there for ever.
--
-- A value: for each place, in order, four bytes: place (24 bits), count (8 bits). A count that reaches MANY stays.
local MANY, FOREVER = 64, 255

local function find(words, place)
  local low, high = 0, #words / 4
  while low < high do
    local middle = math.floor((low + high) / 2)
    if math.floor(struct.unpack('>I4', words, middle * 4 + 1) / 256) < place then
      low = middle + 1
    else
      high = middle
    end
  end
  if low * 4 < #words then
    local word = struct.unpack('>I4', words, low * 4 + 1)
    if math.floor(word / 256) == place then return low, word % 256 end
  end
  return low, nil
end

local function changed(words, place, change)
  local index, count = find(words, place)
  if count == FOREVER then return words, FOREVER end
  local now, after = (count or 0) + change, index * 4 + (count and 5 or 1)
  if now >= MANY then now = FOREVER end
  local word = now > 0 and struct.pack('>I4', place * 256 + now) or ''
  return string.sub(words, 1, index * 4) .. word .. string.sub(words, after), now
end

local base, answers = KEYS[1], {}
local n = count_buckets(base)
for i = 1, #ARGV, 3 do
  local key = bucket_of(base, ARGV[i], n)
  local before = redis.call('HGET', key, ARGV[i]) or ''
  local after, now = changed(before, tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]))
  answers[#answers + 1] = now == FOREVER and 1 or 0
  if after == '' then
    redis.call('HDEL', key, ARGV[i])
  elseif after ~= before then
    redis.call('HSET', key, ARGV[i], after)
    if before == '' then n = make_room(base, key, n) end
  end
end
return answers
