-- Parked callback events of one app. KEYS: <tag>:told. ARGV: the least number, how many at most.
-- Answer: number, packed event, …
-- reads only
local answer = {}
for _, number in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1] .. ':parked', ARGV[1], '+inf', 'LIMIT', 0, ARGV[2])) do
  answer[#answer + 1] = number
  answer[#answer + 1] = redis.call('HGET', KEYS[1], number)
end
return answer
