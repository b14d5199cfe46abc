-- KEYS[1]: <tag>:log. ARGV[1]: tag. Answer: the msg_id in front of the log ("" if it is empty), the last one given.
-- reads only
local front = redis.call("LINDEX", KEYS[1], 0)
return {front and string.match(front, "^%d+") or "", redis.call("HGET", ARGV[1] .. ":head", "id") or "0"}
