-- Merges clicks into the pasts of many users, as append.lua would one by one, but without event tags: a click is known by
-- its time, item and tag while it is still in the past. Behind past.lua.
-- KEYS  pasts
-- ARGV  most clicks of a past, most bytes of one, seconds to keep it; then three for each past: its new records, in the
--       order of a past and none of them twice, how many they are, and the size of the last one
-- Returns for each past how many of the records are new in it and stay there, -1 if it cannot be read: it is left as it is.

local function merge(past, records, count, last_size)
  if past.old == '' and past.floor == '' then -- of a new user
    past.parts[1], past.count, past.tail_size, past.is_changed = records, count, last_size, true
    for i = 1, count do past.places[i] = i end
    return
  end
  local at = 1
  while at <= #records do
    local stop = at + size_of(records, at)
    insert(past, sub(records, at, stop - 1))
    at = stop
  end
end

local results = {}
for i, key in ipairs(KEYS) do
  local past, records = past_at(key), ARGV[3 * i + 1]
  results[i] = -1
  if past and past.old == records then -- the same load again
    results[i] = 0
  elseif past then
    local is_merged, value, dropped = pcall(function()
      merge(past, records, tonumber(ARGV[3 * i + 2]), tonumber(ARGV[3 * i + 3]))
      if past.is_changed then return merged(past) end
    end)
    if is_merged then
      local known = 0
      if value then
        redis.call('SET', key, value, 'EX', past_ttl)
        while known < #past.places and past.places[known + 1] <= dropped do known = known + 1 end
      end
      results[i] = #past.places - known
    end
  end
end
return results
