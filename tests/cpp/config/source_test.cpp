// SPDX-License-Identifier: Apache-2.0
#include "config/source.h"

#include <cstdio>
#include <fstream>

#include "helpers.h"

namespace ds::config {
namespace {

std::string error_of(const std::string& text) {
  try {
    read_document(text);
    return "";
  } catch (const ConfigError& error) {
    return error.message;
  }
}

TEST(Source, Base64) {
  EXPECT_EQ(decode_base64("eyJhIjogMX0="), "{\"a\": 1}");
  EXPECT_EQ(decode_base64("eyJhIjogMX0"), "{\"a\": 1}");
  EXPECT_EQ(decode_base64("-_-_"), decode_base64("+/+/"));
  EXPECT_EQ(decode_base64("a"), std::nullopt);
  EXPECT_EQ(decode_base64("a b="), std::nullopt);
  EXPECT_EQ(read_document("eyJhIjogMX0=").json["a"], 1);
}

TEST(Source, File) {
  const std::string path = ::testing::TempDir() + "ds_source_test.json";
  std::ofstream(path) << "{\"a\": 1,} // fine";
  const Document document = read_document(path);
  EXPECT_EQ(document.json["a"], 1);
  EXPECT_EQ(document.source, path);
  std::ofstream(path) << "{\"a\": }";
  EXPECT_HAS(error_of(path), path + ", line 1 column 7");
  std::ofstream(path) << "{\"a\": \"" << std::string(2 << 20, 'x') << "\"}";
  EXPECT_HAS(error_of(path), "larger than 1 MiB");
  std::remove(path.c_str());
}

TEST(Source, MissingFileIsCalledThat) {
  for (const char* path : {"no_such_config.json", "no_such_folder/zero3.json", "abcd", "dsconfig", "no such file", "/nowhere/x.json"}) {
    EXPECT_HAS(error_of(path), std::string("file not found: ") + path) << path;
  }
  EXPECT_HAS(error_of(::testing::TempDir()), "this is a directory");
  EXPECT_HAS(error_of(""), "empty");
  EXPECT_HAS(error_of("/dev/zero"), "/dev/zero");
  EXPECT_LACKS(error_of("/dev/zero"), "not found");
}

TEST(Source, Text) {
  EXPECT_EQ(read_document(" {a: 1}").json["a"], 1);
  EXPECT_HAS(error_of("{a: }"), "config text, line 1 column 5");
}

}  // namespace
}  // namespace ds::config
