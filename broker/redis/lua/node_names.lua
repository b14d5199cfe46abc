-- Numbers of names; new names get the next. KEYS: the hash. ARGV: names. Answer: their numbers.
-- repeatable
local answer = {}
for i, name in ipairs(ARGV) do
  local number = redis.call('HGET', KEYS[1], name)
  if not number then
    number = redis.call('HLEN', KEYS[1]) + 1
    redis.call('HSET', KEYS[1], name, number)
  end
  answer[i] = tonumber(number)
end
return answer
