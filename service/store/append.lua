-- Adds one user's clicks to their past. The result is the same for any order, repetition and grouping of calls.
-- KEYS  the user's past, then one mark per click
-- ARGV  clicks to keep, seconds to keep the past, seconds to keep a mark, then one packed record per click (see
--       features.py), in the order of a past and each event once
-- Returns 1 for each click that was new, 0 for one already known.

local HEADER, SMALLEST = 3, 22
local byte, sub = string.byte, string.sub
local keep, past_ttl, mark_ttl = tonumber(ARGV[1]), ARGV[2], ARGV[3]

local function u16(text, at)
  return byte(text, at) * 256 + byte(text, at + 1)
end

-- Lua's own < follows the server's locale; bytes do not.
local function compare(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = byte(a, i), byte(b, i)
    if x ~= y then return x - y end
  end
  return #a - #b
end

-- What a record is ordered by: ts and item, then the event's tag.
local function order(text, from)
  local tag = from + 12 + u16(text, from + 2)
  return sub(text, from + 4, tag - 1), sub(text, tag, tag + 7)
end

local records, left = '', 0
local past = redis.call('GET', KEYS[1])
if past and #past >= HEADER and byte(past, 1) == 1 then
  records, left = sub(past, HEADER + 1), u16(past, 2)
end

-- One walk backwards through both, however many there are: nothing else is answered meanwhile. Of `records` what ends
-- at `at` is still to be passed, `left` in number; what was passed or added stands in `newer`, the newest first.
local at, newer = #records, {}

-- Passes what is newer than the record. Returns whether the record is none of those that are there.
local function pass(record)
  local key, tag = order(record, 1)
  while at > 0 do
    local size = u16(records, at - 1)
    local from = at - size + 1
    if size < SMALLEST or from < 1 then -- unreadable: what is older is lost
      at, left = 0, 0
      break
    end
    local other_key, other_tag = order(records, from)
    local difference = compare(other_key, key)
    if difference == 0 then difference = compare(other_tag, tag) end
    if difference <= 0 then return difference < 0 end
    newer[#newer + 1] = sub(records, from, at)
    at, left = from - 1, left - 1
  end
  return true
end

local new, changed = {}, false
for i = #ARGV, 4, -1 do
  new[i - 3] = 0
  if redis.call('SET', KEYS[i - 2], '', 'NX', 'EX', mark_ttl) and pass(ARGV[i]) then
    newer[#newer + 1] = ARGV[i]
    new[i - 3], changed = 1, true
  end
end

if changed then
  local parts = {sub(records, 1, at)}
  for i = #newer, 1, -1 do parts[#parts + 1] = newer[i] end
  records = table.concat(parts)
  local first, count = 1, left + #newer
  while count > keep do
    first = first + u16(records, first)
    count = count - 1
  end
  local header = string.char(1, math.floor(count / 256), count % 256)
  redis.call('SET', KEYS[1], header .. sub(records, first), 'EX', past_ttl)
end
return new
