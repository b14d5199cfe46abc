-- Names in buckets: hashes of at most some MOST entries each, which Redis keeps packed (hash-max-listpack-entries is
-- 128 or more). To be included. Buckets are added one by one as names come, by linear hashing (Litwin, "Linear
-- hashing", VLDB 1980): with n buckets and p the greatest power of two up to n, a name is in bucket h % 2p, or h % p
-- where there is no such bucket yet; bucket n takes its names from bucket n - p.
--
-- Keys: <base>      how many buckets there are, if more than one
--       <base><i>   bucket i, from 0: a hash

local MOST = 110

local function count_buckets(base)
  return tonumber(redis.call('GET', base) or 1)
end

local function power_below(n)
  local power = 1
  while power * 2 <= n do power = power * 2 end
  return power
end

-- The first byte of the digest gives the number in the tag, see names.py.
local power, power_of = 1, 1 -- of the number of buckets that was asked for last
local function bucket_of(base, name, n)
  if n == 1 then return base .. 0 end
  if n ~= power_of then power, power_of = power_below(n), n end
  local h = tonumber(string.sub(redis.sha1hex(name), 3, 8), 16)
  local i = h % (2 * power)
  if i >= n then i = h % power end
  return base .. i
end

local function put_all(key, words)
  for first = 1, #words, 4000 do
    redis.call('HSET', key, unpack(words, first, math.min(first + 3999, #words)))
  end
end

local function add_bucket(base, n)
  local from = base .. (n - power_below(n))
  local words, stay, go = redis.call('HGETALL', from), {}, {}
  for i = 1, #words, 2 do
    local to = bucket_of(base, words[i], n + 1) == from and stay or go
    to[#to + 1] = words[i]
    to[#to + 1] = words[i + 1]
  end
  redis.call('DEL', from)
  put_all(from, stay)
  put_all(base .. n, go)
  redis.call('SET', base, n + 1)
end

-- After names were added: as many buckets as they need, at most one for each name added. Returns how many there are.
local function make_room(base, key, n)
  if redis.call('HLEN', key) > MOST then
    add_bucket(base, n)
    return n + 1
  end
  return n
end
