// SPDX-License-Identifier: Apache-2.0
#include "checkpoint/manifest.h"

#include <gtest/gtest.h>

#include "checkpoint/base64.h"

namespace ds::checkpoint {
namespace {

const char kFile[] = R"({"name":"state_0.safetensors","bytes":5000,"crc32c":"AQAAAAIAAAA="})";

std::string text_with(const std::string& files, const std::string& tensors, const std::string& head = R"("format":"deepspeed-checkpoint","version":1)") {
  return seal_manifest("{" + head + R"(,"block_bytes":4096,"files":[)" + files + R"(],"tensors":[)" + tensors + "]");
}

std::string tensor(const std::string& pieces, const std::string& shape = "[2,5]", const std::string& dtype = "F32", const std::string& more = "") {
  return R"({"name":"w","kind":"fp32","dtype":")" + dtype + R"(","shape":)" + shape + more + R"(,"pieces":)" + pieces + "}";
}

void expect_fault(const std::string& text, ManifestFault fault) {
  try {
    parse_manifest(text);
    ADD_FAILURE() << "accepted, expected " << fault_name(fault) << ": " << text;
  } catch (const ManifestError& error) {
    EXPECT_EQ(error.fault, fault) << error.message;
  }
}

TEST(Manifest, ReadsWhatItSays) {
  const Manifest m = parse_manifest(text_with(kFile, tensor("[[0,0,4,4096],[0,4,6,100]]", "[2,5]", "F32", R"(,"order":[1,0])")));
  ASSERT_EQ(m.files.size(), 1u);
  EXPECT_EQ(m.files[0].sums, (std::vector<uint32_t>{1, 2}));
  ASSERT_EQ(m.tensors.size(), 1u);
  EXPECT_EQ(m.tensors[0].numel, 10);
  EXPECT_EQ(m.tensors[0].order, (std::vector<int64_t>{1, 0}));
  EXPECT_EQ(m.tensors[0].runs[1].begin, 4);
  EXPECT_EQ(m.tensors[0].places[1].offset, 100);
  EXPECT_EQ(parse_manifest(text_with("", tensor("[]", "[3,0,9223372036854775807,4]"))).tensors[0].numel, 0);
  EXPECT_EQ(parse_manifest(text_with(kFile, tensor("[[0,0,1,8]]", "[]"))).tensors[0].numel, 1);
}

TEST(Manifest, EveryFault) {
  const std::string good = text_with(kFile, tensor("[[0,0,10,96]]"));
  parse_manifest(good);
  expect_fault("", ManifestFault::Syntax);
  expect_fault(good.substr(0, good.size() - 1), ManifestFault::Checksum);
  for (size_t at = 0; at < good.size(); ++at) {
    std::string bad = good;
    bad[at] = static_cast<char>(bad[at] ^ 1);
    EXPECT_THROW(parse_manifest(bad), ManifestError) << at;
  }
  expect_fault(seal_manifest("{\"a\":[1,2"), ManifestFault::Syntax);
  expect_fault(text_with("", "", R"("format":"other","version":1)"), ManifestFault::NotOurs);
  expect_fault(text_with("", "", R"("format":"deepspeed-checkpoint","version":2)"), ManifestFault::Version);
  for (const char* name : {"../x", "a/b", "", ".hidden", "a b", "/x"}) {
    expect_fault(text_with(std::string(R"({"name":")") + name + R"(","bytes":0,"crc32c":""})", ""), ManifestFault::FileName);
  }
  expect_fault(text_with(R"({"name":"x","bytes":5000,"crc32c":"AQAAAA=="})", ""), ManifestFault::FileSums);
  expect_fault(text_with(R"({"name":"x","bytes":1,"crc32c":"AQ*AAA=="})", ""), ManifestFault::FileSums);
  expect_fault(text_with(std::string(kFile) + "," + kFile, ""), ManifestFault::Duplicate);
  expect_fault(text_with(kFile, tensor("[[0,0,10,96]]") + "," + tensor("[[0,0,10,96]]")), ManifestFault::Duplicate);
  expect_fault(text_with(kFile, tensor("[[0,0,10,96]]", "[2,5]", "F31")), ManifestFault::Dtype);
  expect_fault(text_with(kFile, tensor("[[0,0,10,96]]", "[4294967296,4294967296]")), ManifestFault::Shape);
  expect_fault(text_with(kFile, tensor("[[0,0,10,96]]", "[2,5]", "F32", R"(,"order":[0,0])")), ManifestFault::Shape);
  expect_fault(text_with(kFile, tensor("[[0,0,9,96]]")), ManifestFault::Cover);
  expect_fault(text_with(kFile, tensor("[[0,0,6,96],[0,5,5,96]]")), ManifestFault::Cover);
  expect_fault(text_with(kFile, tensor("[[1,0,10,96]]")), ManifestFault::PieceOutside);
  expect_fault(text_with(kFile, tensor("[[0,0,10,4964]]")), ManifestFault::PieceOutside);
  expect_fault(text_with(kFile, tensor("[[0,0,10,97]]")), ManifestFault::PieceOutside);
  expect_fault(text_with(kFile, tensor("[[0,0,4611686018427387904,0]]", "[4611686018427387904]", "U8")), ManifestFault::PieceOutside);
  expect_fault(text_with(kFile, tensor("[[0,-1,10,96]]")), ManifestFault::Syntax);
  expect_fault(text_with(kFile, tensor("[[0,0.5,10,96]]")), ManifestFault::Syntax);
}

TEST(Base64, Strict) {
  std::string out;
  EXPECT_TRUE(decode_base64("", &out) && out.empty());
  EXPECT_TRUE(decode_base64("TWFu", &out) && out == "Man");
  EXPECT_TRUE(decode_base64("TWE=", &out) && out == "Ma");
  EXPECT_TRUE(decode_base64("TQ==", &out) && out == "M");
  for (const char* bad : {"TQ=", "TR==", "T===", "TQ==TQ==", "TW\nFu", "TWF"}) EXPECT_FALSE(decode_base64(bad, &out)) << bad;
}

}  // namespace
}  // namespace ds::checkpoint
