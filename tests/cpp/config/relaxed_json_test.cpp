// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <random>

#include "helpers.h"

namespace ds::config {
namespace {

std::string error_of(const std::string& text) {
  try {
    parse_relaxed(text, "file.json");
    return "";
  } catch (const ConfigError& error) {
    return error.message;
  }
}

TEST(RelaxedJson, ReadsPlainJson) {
  const Json value = parse_relaxed(R"({"a": [1, -2, 3.5, 5e8, true, false, null], "b": {"c": "d\n\u00e9\ud83d\ude00"}})", "x");
  EXPECT_EQ(value["a"].dump(), "[1,-2,3.5,500000000.0,true,false,null]");
  EXPECT_EQ(value["b"]["c"], "d\n\xC3\xA9\xF0\x9F\x98\x80");
}

TEST(RelaxedJson, ReadsWhatPeopleWrite) {
  const Json value = parse_relaxed(R"(
    // one
    # two
    { /* three */
      a: 1,      // unquoted
      'b': 'x',
      "c": [1, 2, ],
      d: {e: NaN, f: Infinity, g: -Infinity},
      h: 1
      i: 2,
    } # end
  )", "x");
  EXPECT_EQ(value["a"], 1);
  EXPECT_EQ(value["b"], "x");
  EXPECT_EQ(value["c"].size(), 2u);
  EXPECT_TRUE(std::isnan(value["d"]["e"].get<double>()));
  EXPECT_EQ(value["d"]["g"], -std::numeric_limits<double>::infinity());
  EXPECT_EQ(value["h"], 1);
  EXPECT_EQ(value["i"], 2);
}

TEST(RelaxedJson, KeepsTheOrderOfNames) {
  EXPECT_EQ(parse_relaxed(R"({"z": 1, "a": 2, "m": 3})", "x").dump(), R"({"z":1,"a":2,"m":3})");
}

TEST(RelaxedJson, LimitsOfIntegers) {
  EXPECT_EQ(parse_relaxed("{a: 9223372036854775807}", "x")["a"].get<int64_t>(), std::numeric_limits<int64_t>::max());
  EXPECT_TRUE(parse_relaxed("{a: 9223372036854775808}", "x")["a"].is_number_float());
  EXPECT_TRUE(std::isinf(parse_relaxed("{a: 1e999}", "x")["a"].get<double>()));
}

TEST(RelaxedJson, RefusesDuplicatesAtAnyDepth) {
  EXPECT_HAS(error_of("{\"zero\": {\"stage\": 1,\n \"stage\": 2}}"),
             "file.json, line 2 column 2: \"zero.stage\" is given twice, first at line 1 column 11");
  EXPECT_EQ(error_of("{\"a\": {\"s\": 1}, \"b\": {\"s\": 1}}"), "");
}

TEST(RelaxedJson, ErrorsNameThePlace) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "the document is empty"},
      {"// only a comment", "the document is empty"},
      {"[1]", "the document must be an object"},
      {"{", "the text ends before '}'"},
      {"{\"a\"", "expected ':'"},
      {"{\"a\": ", "ends where a value"},
      {"{\"a\": 1", "ends before '}'"},
      {"{\"a\": [1", "ends before ']'"},
      {"{\"a\": 1 \"b\": 2}", "expected ',' or '}'"},
      {"{\"a\": 1,, \"b\": 2}", "two commas"},
      {"{\"a\": 1} x", "after the end"},
      {"{\"a\": tru}", "text needs quotes"},
      {"{\"a\": True}", "small letters"},
      {"{\"a\": None}", "JSON writes null"},
      {"{\"a\": 01}", "not a number"},
      {"{\"a\": 1.}", "not a number"},
      {"{\"a\": 1e}", "not a number"},
      {"{\"a\": -}", "not a number"},
      {"{\"a\": 0x10}", "not a number"},
      {"{\"a\": 1_000}", "not a number"},
      {"{\"a\": +1}", "not a number"},
      {"{\"a\": \"x}", "never closed"},
      {"{\"a\": \"x\n\"}", "never closed"},
      {"{\"a\": /* }", "comment is never closed"},
      {"{\"a\": \"\\x\"}", "unknown escape"},
      {"{\"a\": \"\\u12\"}", "four hexadecimal digits"},
      {"{\"a\": \"\\ud800\"}", "surrogate"},
      {"{\"a\": \"\\udc00\"}", "surrogate"},
      {"{\"a\": \"\xFF\"}", "not UTF-8"},
      {"{\"a\": \"\xC0\x80\"}", "not UTF-8"},
      {"{\"a\": \"\xED\xA0\x80\"}", "not UTF-8"},
      {"{\"a\": \"x\x01\"}", "control character"},
      {"{1: 2}", "expected a name"},
      {"{a: }", "expected a value"},
  };
  for (const auto& [text, expected] : cases) {
    EXPECT_HAS(error_of(text), expected) << text;
    EXPECT_HAS(error_of(text), "file.json, line ") << text;
  }
}

TEST(RelaxedJson, DepthIsLimited) {
  const auto nested = [](int depth) { return "{a: " + std::string(depth, '[') + std::string(depth, ']') + "}"; };
  EXPECT_EQ(error_of(nested(kMaxDepth - 1)), "");
  EXPECT_HAS(error_of(nested(kMaxDepth)), "nested deeper than 64");
  EXPECT_HAS(error_of(nested(200000)), "nested deeper than 64");
}

TEST(RelaxedJson, ManyNamesInReasonableTime) {
  std::string text = "{";
  for (int i = 0; i < 100000; ++i) text += "a" + std::to_string(i) + ":1,";
  EXPECT_EQ(parse_relaxed(text + "}", "x").size(), 100000u);
}

// Whatever the bytes, the answer is a document or a ConfigError.
TEST(RelaxedJson, RandomBytes) {
  std::mt19937 random(1);
  const std::string alphabet = "{}[]\"':,\\/#*\n -+.0123456789eEtrufalsn_aN\xC3\xA9\xFF\x80";
  for (int round = 0; round < 20000; ++round) {
    std::string text = "{";
    const size_t length = random() % 60;
    for (size_t i = 0; i < length; ++i) text += alphabet[random() % alphabet.size()];
    error_of(text);
  }
}

TEST(RelaxedJson, DamagedDocuments) {
  const std::string good = R"({"train_batch_size": 8, /* c */ "fp16": {"enabled": true, "loss_scale": 0.5e1}, x: ['a', "b\u00e9", null]})";
  ASSERT_EQ(error_of(good), "");
  std::mt19937 random(2);
  for (int round = 0; round < 20000; ++round) {
    std::string text = good;
    for (unsigned change = 0; change < 1 + random() % 3; ++change) {
      const size_t at = random() % text.size();
      if (random() % 2) {
        text[at] = static_cast<char>(random());
      } else {
        text.erase(at, 1 + random() % 5);
      }
      if (text.empty()) text = "{";
    }
    const std::string outcome = refusal(text);  // all the way through the reader
    EXPECT_EQ(outcome.find('\0'), std::string::npos);
  }
}

}  // namespace
}  // namespace ds::config
