// Cross-entropy of rows on the CPU: loss per row in nats and, over the logits, the gradient. No Python, no
// torch.
#pragma once

#include <cstdint>
#include <string>

namespace velopath {

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
    bool gradient;  // write scale * (softmax - one hot) over the logits, 0 where ignored
    int threads;    // never changes a result: each row is one thread's
};

// The instruction sets that this build has and this machine runs, best first, separated by spaces: any of
// "avx512 avx2 generic".
std::string instruction_sets();

// Runs the rows with one of `instruction_sets()`, the best when `set` is empty; false when it is not there.
bool cross_entropy_rows(const CrossEntropyRows& work, const std::string& set);

}  // namespace velopath
