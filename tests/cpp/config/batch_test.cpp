// SPDX-License-Identifier: Apache-2.0
#include "helpers.h"

namespace ds::config {
namespace {

struct Case {
  const char* text;
  int64_t ranks, train, micro, accumulation;
};

TEST(Batch, DerivesWhatIsMissing) {
  const Case cases[] = {
      {"{train_batch_size: 16, train_micro_batch_size_per_gpu: 2, gradient_accumulation_steps: 4}", 2, 16, 2, 4},
      {"{train_batch_size: 16, train_micro_batch_size_per_gpu: 2}", 2, 16, 2, 4},
      {"{train_batch_size: 16, gradient_accumulation_steps: 4}", 2, 16, 2, 4},
      {"{train_micro_batch_size_per_gpu: 2, gradient_accumulation_steps: 4}", 2, 16, 2, 4},
      {"{train_batch_size: 16}", 2, 16, 8, 1},
      {"{train_micro_batch_size_per_gpu: 2}", 2, 4, 2, 1},
      {"{train_batch_size: 16, train_micro_batch_size_per_gpu: 'auto', gradient_accumulation_steps: null}", 2, 16, 8, 1},
      {"{train_batch_size: 8.0, train_micro_batch_size_per_gpu: 4e0}", 1, 8, 4, 2},
      {"{train_micro_batch_size_per_gpu: 3, sequence_parallel_size: 2}", 4, 6, 3, 1},
      {"{train_micro_batch_size_per_gpu: 3, sequence_parallel_size: 2, data_parallel_size: 2}", 4, 6, 3, 1},
  };
  for (const Case& c : cases) {
    const Config config = loaded(c.text, ranks(c.ranks));
    EXPECT_EQ(config.batch.train, c.train) << c.text;
    EXPECT_EQ(config.batch.micro, c.micro) << c.text;
    EXPECT_EQ(config.batch.accumulation, c.accumulation) << c.text;
    EXPECT_EQ(config.values["train_batch_size"], c.train) << c.text;
  }
}

// Every solution satisfies the equation, and every refusal is one that no derivation could satisfy.
TEST(Batch, EquationHoldsOrIsRefused) {
  for (int64_t train = 0; train <= 12; ++train) {
    for (int64_t micro = 0; micro <= 6; ++micro) {
      for (int64_t steps = 0; steps <= 4; ++steps) {
        for (int64_t world = 1; world <= 4; ++world) {
          Batch batch;
          if (train) batch.train = train;
          if (micro) batch.micro = micro;
          if (steps) batch.accumulation = steps;
          World who;
          who.size = world;
          Findings findings;
          solve_batch(batch, who, true, findings);
          if (findings.clean()) {
            EXPECT_EQ(*batch.train, *batch.micro * *batch.accumulation * world);
            EXPECT_GT(*batch.micro, 0);
            EXPECT_GT(*batch.accumulation, 0);
          } else {
            const int64_t known = (micro ? micro : 1) * (steps ? steps : 1) * world;
            const bool fixed_wrongly = micro && steps && train != known;
            EXPECT_TRUE((!train && !micro) || train % known != 0 || fixed_wrongly) << train << micro << steps << world;
          }
        }
      }
    }
  }
}

TEST(Batch, MessageTellsEveryNumberAndItsOrigin) {
  EXPECT_HAS(refusal("{train_batch_size: 7, train_micro_batch_size_per_gpu: 2}", ranks(2)),
             "train_batch_size = train_micro_batch_size_per_gpu x gradient_accumulation_steps x data-parallel world size",
             "7 is not 2 x 1 x 2 = 4", "train_batch_size = 7 (given)", "train_micro_batch_size_per_gpu = 2 (given)",
             "gradient_accumulation_steps = 1 (derived: 7 / 2 / 2)", "data-parallel world size = 2 (the test)",
             "multiple of 4, e.g. 4 or 8");
  Options options = ranks(8);
  options.world.ranks_per_sample = 4;
  options.world.ranks_per_sample_source = "an mpu";
  EXPECT_HAS(refusal("{train_batch_size: 5}", options), "data-parallel world size = 2 (8 ranks (the test) / 4 (an mpu))");
}

TEST(Batch, Refusals) {
  EXPECT_HAS(refusal("{}"), "both missing");
  EXPECT_HAS(refusal("{gradient_accumulation_steps: 2}"), "= 2 alone is not enough");
  EXPECT_HAS(refusal("{train_batch_size: 1, gradient_accumulation_steps: 2}"), "1 is not 0 x 2 x 1 = 0");
  EXPECT_HAS(refusal("{train_batch_size: 0}"), "train_batch_size: found 0 (integer); allowed: an integer of at least 1");
  EXPECT_HAS(refusal("{train_batch_size: '8'}"), "found \"8\" (string)");
  EXPECT_HAS(refusal("{train_batch_size: true}"), "found true");
  EXPECT_HAS(refusal("{train_micro_batch_size_per_gpu: 1, sequence_parallel_size: 3}", ranks(4)),
             "sequence_parallel_size: 4 ranks (the test) cannot be divided into groups of 3");
  EXPECT_HAS(refusal("{train_micro_batch_size_per_gpu: 1, sequence_parallel_size: 2, data_parallel_size: 4}", ranks(4)),
             "data_parallel_size: found 4");
}

TEST(Batch, HugeNumbersDoNotOverflow) {
  EXPECT_HAS(refusal("{train_micro_batch_size_per_gpu: 9000000000000000000, gradient_accumulation_steps: 9}"), "more than fits");
  EXPECT_HAS(refusal("{train_batch_size: 9223372036854775807, train_micro_batch_size_per_gpu: 9000000000000000000, "
                      "gradient_accumulation_steps: 9000000000000000000}"), "more than fits");
}

TEST(Batch, NotRequired) {
  Options options;
  options.batch_required = false;
  const Config config = loaded("{}", options);
  EXPECT_FALSE(config.batch.train.has_value());
  EXPECT_EQ(config.batch.accumulation, 1);
}

// All three given: what each would have to be, not the value that was found.
TEST(Batch, NamesTheOneToChange) {
  EXPECT_HAS(refusal("{train_batch_size: 16, train_micro_batch_size_per_gpu: 2, gradient_accumulation_steps: 2}", ranks(2)),
             "change one of them: train_batch_size to 8, or train_micro_batch_size_per_gpu to 4, or gradient_accumulation_steps to 4");
  EXPECT_HAS(refusal("{train_batch_size: 15, train_micro_batch_size_per_gpu: 2, gradient_accumulation_steps: 2}", ranks(2)),
             "change one of them: train_batch_size to 8; or leave one out");
}

}  // namespace
}  // namespace ds::config
