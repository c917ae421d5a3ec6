// Cross-entropy of rows on the CPU: loss per row in nats and, over the logits, the gradient. No Python, no
// torch.
#pragma once

#include <cstdint>
#include <string>

namespace velopath {

// What changes the loss of a row. With r the logits given, x = softcap * tanh(logit_scale * r / softcap), or
// logit_scale * r for softcap 0; lse = log sum exp x; nats = lse - x_target;
// loss = (1 - label_smoothing) * nats + label_smoothing * (lse - mean x) + z_loss * lse^2.
struct RowOptions {
    double logit_scale = 1.0;
    double softcap = 0.0;
    double label_smoothing = 0.0;
    double z_loss = 0.0;
};

// What the rows of one call share. `stride` counts elements from row to row.
struct CrossEntropyRows {
    void* logits;            // (rows, vocab), fp32, or bf16 when `half`
    const int64_t* targets;  // (rows): in [0, vocab) or `ignore_index`
    float* nats;             // (rows), written: log sum exp of the row - logit of its target; 0 where ignored
    int64_t rows;
    int64_t vocab;
    int64_t stride;
    int64_t ignore_index;
    float scale;    // what each row's gradient is multiplied by, 1 / (counted rows) for a mean
    bool half;      // bf16
    bool gradient;  // write scale * d loss / d logits over the logits, 0 where ignored
    int threads;    // never changes a result: each row is one thread's
    RowOptions options;
    const float* scales;  // (rows) in place of `scale`, or null; with it lse and losses
    float* lse;           // (rows), written
    float* losses;        // (rows), written: scales * loss
    float* correct;       // (rows), written, or null: 1 where the target is the first of the largest logits
};

// Rows of which this process holds some columns. A target counts from the first of them: -1 stands for any
// column left of them, vocab for any right of them, NOT_COUNTED for an ignored row.
constexpr int64_t NOT_COUNTED = -2;
constexpr int64_t STATISTICS = 7;  // max x, max r, max r left of the target, sum exp(x - max x),
                                   // x and r at the target (0 elsewhere), sum x
constexpr int64_t FACTORS = 4;     // m, a, b, t: gradient (exp(x - m) a - b - [target] t) dx/dr
struct ShardRows {
    void* logits;  // as above
    const int64_t* targets;
    double* statistics;     // (STATISTICS, rows), written, or null
    const double* factors;  // (FACTORS, rows), or null: then the gradient is written over the logits
    int64_t rows;
    int64_t vocab;
    int64_t stride;
    bool half;
    int threads;
    RowOptions options;  // logit_scale and softcap only
};

// The instruction sets that this build has and this machine runs, best first, separated by spaces: any of
// "avx512 avx2 generic".
std::string instruction_sets();

// Runs the rows with one of `instruction_sets()`, the best when `set` is empty; false when it is not there.
bool cross_entropy_rows(const CrossEntropyRows& work, const std::string& set);
bool shard_rows(const ShardRows& work, const std::string& set);

}  // namespace velopath
