// SPDX-License-Identifier: Apache-2.0
#include "io/safetensors.h"

#include <dirent.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace ds::io {
namespace {

using platform::File;
using Fault = SafetensorsFault;

class Safetensors : public ::testing::Test {
 protected:
  Safetensors() {
    std::string pattern = ::testing::TempDir() + "/ds_st_XXXXXX";
    directory_ = mkdtemp(pattern.data());
    path_ = directory_ + "/t.safetensors";
  }
  ~Safetensors() override { EXPECT_EQ(std::system(("rm -rf '" + directory_ + "'").c_str()), 0); }

  void put(const std::string& bytes) const { File(path_, File::Mode::Create).write(bytes.data(), bytes.size(), 0); }

  static std::string with_length(const std::string& header, uint64_t length) {
    std::string out;
    for (int i = 0; i < 8; ++i) out += static_cast<char>(length >> (8 * i));
    return out + header;
  }

  // A whole file of this header and that many zero bytes.
  void put_header(const std::string& header, size_t data_bytes) const {
    put(with_length(header, header.size()) + std::string(data_bytes, '\0'));
  }

  void expect_fault(Fault fault) const {
    try {
      SafetensorsReader(*engine_, path_);
      ADD_FAILURE() << "was accepted, expected " << fault_name(fault);
    } catch (const SafetensorsError& error) {
      EXPECT_EQ(error.fault, fault) << error.what();
      EXPECT_NE(error.message.find(path_), std::string::npos) << error.what();
      EXPECT_NE(error.message.find(fault_name(fault)), std::string::npos) << error.what();
    }
  }

  void expect_fault(Fault fault, const std::string& header, size_t data_bytes) const {
    SCOPED_TRACE(header);
    put_header(header, data_bytes);
    expect_fault(fault);
  }

  std::vector<std::string> files() const {
    std::vector<std::string> names;
    DIR* directory = opendir(directory_.c_str());
    while (const dirent* entry = readdir(directory)) {
      if (entry->d_name[0] != '.') names.emplace_back(entry->d_name);
    }
    closedir(directory);
    return names;
  }

  std::unique_ptr<FileEngine> engine_ = FileEngine::create({});
  std::string directory_, path_;
};

TEST_F(Safetensors, RoundTrip) {
  const std::vector<float> weights = {1, 2, 3, 4, 5, 6};
  const std::vector<uint16_t> halves = {7, 8, 9};
  const uint8_t scalar = 42;
  const std::string odd = "odd \"name\"\\ \n \xc3\xa9";
  write_safetensors(*engine_, path_,
                    {{"scalar", DType::U8, {}, &scalar},
                     {odd, DType::BF16, {3, 1}, halves.data()},
                     {"empty", DType::F32, {0, 5}, nullptr},
                     {"w", DType::F32, {2, 3}, weights.data()}},
                    {{"format", "pt"}, {"a\tb", "c"}});
  const SafetensorsReader reader(*engine_, path_);
  ASSERT_EQ(reader.tensors().size(), 4u);
  EXPECT_EQ(reader.metadata().at("format"), "pt");
  EXPECT_EQ(reader.metadata().at("a\tb"), "c");
  const TensorEntry& w = reader.find("w");
  EXPECT_EQ(w.dtype, DType::F32);
  EXPECT_EQ(w.shape, (std::vector<int64_t>{2, 3}));
  std::vector<float> back(6);
  reader.read(*engine_, w, 0, back.data(), 24)->wait();
  EXPECT_EQ(back, weights);
  float third = 0;
  reader.read(*engine_, w, 8, &third, 4)->wait();
  EXPECT_EQ(third, 3);
  std::vector<uint16_t> halves_back(3);
  reader.read(*engine_, reader.find(odd), 0, halves_back.data(), 6)->wait();
  EXPECT_EQ(halves_back, halves);
  uint8_t byte = 0;
  reader.read(*engine_, reader.find("scalar"), 0, &byte, 1)->wait();
  EXPECT_EQ(byte, 42);
  EXPECT_EQ(reader.find("empty").bytes(), 0);
  EXPECT_TRUE(reader.contains("w"));
  EXPECT_FALSE(reader.contains("v"));
  EXPECT_THROW(reader.find("v"), ValueError);
  EXPECT_THROW(reader.read(*engine_, w, 20, back.data(), 8), ValueError);
  EXPECT_THROW(reader.read(*engine_, w, -1, back.data(), 1), ValueError);
  EXPECT_EQ(files(), std::vector<std::string>{"t.safetensors"});
}

TEST_F(Safetensors, EqualContentsGiveEqualFiles) {
  const float x = 1, y = 2;
  write_safetensors(*engine_, path_, {{"x", DType::F32, {1}, &x}, {"y", DType::F32, {1}, &y}}, {});
  write_safetensors(*engine_, directory_ + "/u", {{"y", DType::F32, {1}, &y}, {"x", DType::F32, {1}, &x}}, {});
  EXPECT_EQ(std::system(("cmp '" + path_ + "' '" + directory_ + "/u'").c_str()), 0);
}

TEST_F(Safetensors, NoTensorsAtAll) {
  write_safetensors(*engine_, path_, {}, {});
  EXPECT_TRUE(SafetensorsReader(*engine_, path_).tensors().empty());
}

TEST_F(Safetensors, AcceptsWhatTheFormatAllows) {
  put_header(" ", 0);
  expect_fault(Fault::HeaderStart);
  put_header(R"({ "a" : {"shape":[ 2 ],"data_offsets":[0,8], "dtype":"F32"} , "__metadata__":{"k":"\u00e9\ud83d\ude00\/"} }   )", 8);
  const SafetensorsReader reader(*engine_, path_);
  EXPECT_EQ(reader.find("a").bytes(), 8);
  EXPECT_EQ(reader.metadata().at("k"), "\xc3\xa9\xf0\x9f\x98\x80/");
}

TEST_F(Safetensors, LengthFaults) {
  put("");
  expect_fault(Fault::TooShort);
  put("1234567");
  expect_fault(Fault::TooShort);
  put(with_length("{}", ~uint64_t{0}));
  expect_fault(Fault::HeaderTooLarge);
  put(with_length("{}", kMaxHeaderBytes + 1));
  expect_fault(Fault::HeaderTooLarge);
  put(with_length("{}", 3));
  expect_fault(Fault::HeaderPastEnd);
  put(with_length("", 0));
  expect_fault(Fault::HeaderStart);
}

TEST_F(Safetensors, SyntaxFaults) {
  for (const char* header :
       {"{", "{}}", "{]", "{\"a\"}", "{\"a\":1}", "{\"a\":{}}", R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1}})",
        R"({"a":{"dtype":"F32","shape":[]}})", R"({"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}})",
        R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", R"({"a":{"dtype":"F32","shape":[01],"data_offsets":[0,4]}})",
        R"({"a":{"dtype":"F32","shape":[1,],"data_offsets":[0,4]}})", R"({"a":{"dtype":"F32","shape":1,"data_offsets":[0,4]}})",
        R"({"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,4]}})",
        R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}})",
        R"({"a":{"dtype":4,"shape":[1],"data_offsets":[0,4]}})", R"({"__metadata__":{"a":1}})", R"({"__metadata__":{"a":"\q"}})",
        R"({"__metadata__":{"a":"\u12"}})", R"({"__metadata__":{"a":"\ud800"}})", R"({"__metadata__":{"a":"\udc00"}})",
        R"({"__metadata__":{"a":"\ud800\u0041"}})", "{\"a", "{\"\x01\":1}", "{,}", "{}x"}) {
    expect_fault(Fault::HeaderSyntax, header, 4);
  }
}

TEST_F(Safetensors, EncodingFaults) {
  for (const char* bytes : {"\xff", "\x80", "\xc0\x80", "\xe0\x80\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80", "\xf5\x80\x80\x80", "\xc3"}) {
    expect_fault(Fault::HeaderEncoding, "{\"" + std::string(bytes) + "\":1}", 4);
  }
}

TEST_F(Safetensors, MeaningFaults) {
  const auto tensor = [](const std::string& name, const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets + "}";
  };
  expect_fault(Fault::DuplicateName, "{" + tensor("a", "F32", "[1]", "[0,4]") + "," + tensor("a", "F32", "[1]", "[4,8]") + "}", 8);
  expect_fault(Fault::DuplicateName, R"({"__metadata__":{"a":"1","a":"2"}})", 0);
  expect_fault(Fault::DuplicateName, R"({"__metadata__":{},"__metadata__":{}})", 0);
  expect_fault(Fault::DuplicateName, R"({"a":{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}})", 4);
  expect_fault(Fault::UnknownDtype, "{" + tensor("a", "F33", "[1]", "[0,4]") + "}", 4);
  expect_fault(Fault::InvalidShape, "{" + tensor("a", "F32", "[4611686018427387904,4]", "[0,4]") + "}", 4);
  expect_fault(Fault::InvalidOffsets, "{" + tensor("a", "F32", "[1]", "[4,0]") + "}", 4);
  expect_fault(Fault::InvalidOffsets, "{" + tensor("a", "F32", "[2]", "[0,8]") + "}", 4);
  expect_fault(Fault::SizeMismatch, "{" + tensor("a", "F32", "[1]", "[0,3]") + "}", 4);
  expect_fault(Fault::SizeMismatch, "{" + tensor("a", "F32", "[]", "[0,0]") + "}", 0);
  expect_fault(Fault::Overlap, "{" + tensor("a", "F32", "[2]", "[0,8]") + "," + tensor("b", "F32", "[2]", "[4,12]") + "}", 12);
  expect_fault(Fault::Gap, "{" + tensor("a", "F32", "[1]", "[4,8]") + "}", 8);
  expect_fault(Fault::Gap, "{" + tensor("a", "F32", "[1]", "[0,4]") + "," + tensor("b", "F32", "[1]", "[8,12]") + "}", 12);
  expect_fault(Fault::TrailingBytes, "{" + tensor("a", "F32", "[1]", "[0,4]") + "}", 5);
  expect_fault(Fault::TrailingBytes, "{}", 1);
}

TEST_F(Safetensors, EveryTruncationIsRefused) {
  const std::vector<float> weights = {1, 2, 3, 4};
  write_safetensors(*engine_, path_, {{"w", DType::F32, {4}, weights.data()}}, {});
  File file(path_, File::Mode::ReadWrite);
  for (int64_t bytes = file.size() - 1; bytes >= 0; bytes -= bytes > 4090 || bytes < 130 ? 1 : 61) {
    file.resize(bytes);
    EXPECT_THROW(SafetensorsReader(*engine_, path_), SafetensorsError) << bytes;
  }
}

TEST_F(Safetensors, WriterRefusesNonsense) {
  const float x = 1;
  EXPECT_THROW(write_safetensors(*engine_, path_, {{"x", DType::F32, {1}, &x}, {"x", DType::F32, {1}, &x}}, {}), ValueError);
  EXPECT_THROW(write_safetensors(*engine_, path_, {{"x", DType::F32, {-1}, &x}}, {}), ValueError);
  EXPECT_THROW(write_safetensors(*engine_, path_, {{"x", DType::F32, {1}, nullptr}}, {}), ValueError);
  EXPECT_THROW(write_safetensors(*engine_, path_, {{"__metadata__", DType::F32, {1}, &x}}, {}), ValueError);
  EXPECT_THROW(write_safetensors(*engine_, path_, {{"\xff", DType::F32, {1}, &x}}, {}), SafetensorsError);
  EXPECT_TRUE(files().empty());
}

TEST_F(Safetensors, AFailedWriteLeavesTheOldFile) {
  const float x = 1;
  write_safetensors(*engine_, path_, {{"x", DType::F32, {1}, &x}}, {});
  // Memory that cannot be read: the write fails after the header went out.
  EXPECT_THROW(write_safetensors(*engine_, path_, {{"x", DType::F32, {1 << 20}, reinterpret_cast<const void*>(4096)}}, {}),
               platform::FileError);
  EXPECT_EQ(SafetensorsReader(*engine_, path_).find("x").bytes(), 4);
  EXPECT_EQ(files(), std::vector<std::string>{"t.safetensors"});
}

}  // namespace
}  // namespace ds::io
