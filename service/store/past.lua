-- A user's past: how it is read, how a click's record is merged into it, how it is written. In front of append.lua and
-- merge.lua, whose ARGV begins with the most clicks of a past, the most bytes of one, and the seconds to keep it. The
-- layout stands in codec.py.

local HEADER, FRONT = 9, 10
local byte, sub, char, format = string.byte, string.sub, string.char, string.format
local max_clicks, max_bytes = tonumber(ARGV[1]), tonumber(ARGV[2])
local past_ttl = ARGV[3]

local function u16(text, at)
  local a, b = byte(text, at, at + 1)
  return a * 256 + b
end

local function bytes_of(number, count)
  local bytes = {}
  for i = count, 1, -1 do
    bytes[i] = char(number % 256)
    number = math.floor(number / 256)
  end
  return table.concat(bytes)
end

local function size_of(text, at)
  local size = byte(text, at)
  if size == 255 then size = u16(text, at + 1) end
  if size <= FRONT then error('a record of ' .. size .. ' bytes') end
  return size
end

-- Where a record's content begins: its item's form, its time, its tag, its item.
local function content(text, at)
  return byte(text, at) < 255 and at + 1 or at + 3
end

local function time_of(text, at)
  local a, b, c, d, e, f = byte(text, at + 1, at + 6)
  return ((((a * 256 + b) * 256 + c) * 256 + d) * 256 + e) * 256 + f
end

local function item_of(text, at)
  local form, from = byte(text, at), at + FRONT
  if form <= 22 then return sub(text, from, from + form - 1), from + form end
  if form == 31 then
    local size = u16(text, from)
    return sub(text, from + 2, from + 1 + size), from + 2 + size
  end
  local number, stop = 0, from + form - 22
  for i = from, stop - 1 do number = number * 256 + byte(text, i) end
  return format('%.0f', number), stop
end

-- Lua's own < follows the server's locale; bytes do not.
local function compare_bytes(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = byte(a, i), byte(b, i)
    if x ~= y then return x - y end
  end
  return #a - #b
end

-- By time, item and tag: negative where the record at `i` of `a` comes before the one at `j` of `b`.
local function compare(a, i, b, j)
  i, j = content(a, i), content(b, j)
  local difference = time_of(a, i) - time_of(b, j)
  if difference ~= 0 then return difference end
  difference = compare_bytes(item_of(a, i), item_of(b, j))
  if difference ~= 0 then return difference end
  return compare_bytes(sub(a, i + 7, i + 9), sub(b, j + 7, j + 9))
end

-- The record without its features.
local function floor_of(text, at)
  local from = content(text, at)
  local _, stop = item_of(text, from)
  local front = sub(text, from, stop - 1)
  local size = #front + 1
  return size < 255 and char(size) .. front or char(255) .. bytes_of(size + 2, 2) .. front
end

-- A past as it is to be merged into; false for a value that cannot be read. `parts` are the new past as far as it is
-- merged, `rest` is where in `old` the unmerged records begin, after `passed` others, and `last` where its last one does.
-- `places` are those of the merged records among all.
local function past_at(key)
  local value = redis.pcall('GET', key)
  local past = {
    old = '', rest = 1, passed = 0, last = 0, old_count = 0, count = 0, floor = '', parts = {}, places = {},
  }
  if value then
    if type(value) == 'table' or #value < HEADER or byte(value, 1) ~= 2 then return false end
    local begin = HEADER + u16(value, 8)
    local a, b, c, d = byte(value, 4, 7)
    past.old, past.floor = sub(value, begin + 1), sub(value, HEADER + 1, begin)
    past.last = ((a * 256 + b) * 256 + c) * 256 + d - begin + 1
    past.old_count = u16(value, 2)
    past.count = past.old_count
  end
  return past
end

-- Merges a record that is later than those before it. Whether it is none of those that are there.
local function insert(past, record)
  if past.floor ~= '' and compare(record, 1, past.floor, 1) <= 0 then return true end
  local old, parts = past.old, past.parts
  if past.rest <= #old then
    if compare(record, 1, old, past.last) > 0 then
      parts[#parts + 1] = sub(old, past.rest)
      past.rest, past.passed = #old + 1, past.old_count
    else
      local at = past.rest
      local difference = compare(old, at, record, 1)
      while difference < 0 do
        at = at + size_of(old, at)
        past.passed = past.passed + 1
        difference = compare(old, at, record, 1)
      end
      if at > past.rest then
        parts[#parts + 1] = sub(old, past.rest, at - 1)
        past.rest = at
      end
      if difference == 0 then return false end
    end
  end
  parts[#parts + 1] = record
  past.count, past.tail_size, past.is_changed = past.count + 1, #record, true
  past.places[#past.places + 1] = past.passed + #past.places + 1
  return true
end

-- The past's new value, and how many records it dropped.
local function merged(past)
  local old, parts = past.old, past.parts
  local last_size
  if past.rest <= #old then
    parts[#parts + 1] = sub(old, past.rest)
    last_size = #old - past.last + 1
  else
    last_size = past.tail_size
  end
  local records = table.concat(parts)
  local from, count = 1, past.count
  while count > max_clicks do
    from = from + size_of(records, from)
    count = count - 1
  end
  -- What is dropped for its bytes, and all before it, must not come in again where something smaller would fit.
  local dropped
  while #records - from + 1 > max_bytes do
    dropped = from
    from = from + size_of(records, from)
    count = count - 1
  end
  local floor = past.floor
  if dropped then
    floor = floor_of(records, dropped)
  elseif count == max_clicks then
    floor = ''
  end
  local last = count > 0 and HEADER + #floor + (#records - from + 1) - last_size or 0
  local value = char(2) .. bytes_of(count, 2) .. bytes_of(last, 4) .. bytes_of(#floor, 2) .. floor .. sub(records, from)
  return value, past.count - count
end
