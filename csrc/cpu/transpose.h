// Rows whose elements lie one behind another to columns, and back.
#pragma once

#include "computing.h"

namespace fused_ce {
namespace {

// A step of `transpose`: `places` are the lanes of two vectors that make up the first of the new
// ones; the second's lie `apart` lanes behind them.
template <int kDistance>
FUSED_CE_HOST_DEVICE void turn(Floats (&square)[kLanes], Ints places, int apart) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & kDistance) continue;
    Floats one = square[i], other = square[i + kDistance];
    square[i] = shuffle(one, other, places);
    square[i + kDistance] = shuffle(one, other, places + apart);
  }
}

// Rows to columns, first within four lanes, then groups of four: there are instructions for these
// steps.
FUSED_CE_HOST_DEVICE void transpose(Floats (&square)[kLanes]) {
  Ints in_turn, even_groups;
  for (int lane = 0; lane < kLanes; ++lane) {
    int group = lane / 4, place = lane % 4;
    in_turn[lane] = place % 2 * kLanes + group * 4 + place / 2;
    even_groups[lane] = group * 8 + place;
  }
  turn<2>(square, in_turn, 2);
  turn<1>(square, in_turn, 2);
  if constexpr (kLanes > 4) turn<4>(square, even_groups, 4);
  if constexpr (kLanes > 8) turn<8>(square, even_groups, 4);
}

// kCount vectors are kLanes rows of kCount columns that lie one behind another, or these columns.
// Which lanes of what has been gathered (the first kLanes) and of vector `from` make up one of
// them.
template <int kCount>
struct FewTurns {
  alignas(64) int32_t to_columns[kCount][kCount][kLanes] = {};  // [column][from][lane]
  alignas(64) int32_t to_rows[kCount][kCount][kLanes] = {};     // [vector][from][lane]
  constexpr FewTurns() {
    for (int i = 0; i < kCount; ++i) {
      for (int from = 1; from < kCount; ++from) {
        for (int lane = 0; lane < kLanes; ++lane) {
          int place = lane * kCount + i;  // of row `lane`'s element of column i
          to_columns[i][from][lane] = pick(place / kLanes, place % kLanes, from, lane);
          place = i * kLanes + lane;
          to_rows[i][from][lane] = pick(place % kCount, place / kCount, from, lane);
        }
      }
    }
  }
  static constexpr int32_t pick(int vector, int lane, int from, int own) {
    return vector == from ? kLanes + lane : from == 1 && vector == 0 ? lane : own;
  }
};
template <int kCount>
FUSED_CE_HOST_DEVICE void transpose_few(const int32_t (&turns)[kCount][kCount][kLanes],
                                        Floats (&v)[kCount]) {
  Floats turned[kCount];
#pragma GCC unroll 4
  for (int i = 0; i < kCount; ++i) {
    turned[i] = v[0];
#pragma GCC unroll 4
    for (int from = 1; from < kCount; ++from) {
      Ints lanes;
      memcpy(&lanes, turns[i][from], sizeof(lanes));
      turned[i] = shuffle(turned[i], v[from], lanes);
    }
  }
  for (int i = 0; i < kCount; ++i) v[i] = turned[i];
}
template <int kCount>
FUSED_CE_HOST_DEVICE void to_columns(Floats (&v)[kCount]) {
  static constexpr FewTurns<kCount> kTurns;
  transpose_few(kTurns.to_columns, v);
}
template <int kCount>
FUSED_CE_HOST_DEVICE void to_rows(Floats (&v)[kCount]) {
  static constexpr FewTurns<kCount> kTurns;
  transpose_few(kTurns.to_rows, v);
}

// float64 is moved one element at a time: lane `lane` of vector i comes from place(i, lane).
template <int kCount, class F>
FUSED_CE_HOST_DEVICE void move_lanes(Doubles (&v)[kCount], F place) {
  constexpr int kWidth = kLanes / 2;
  double from[kCount * kWidth];
  memcpy(from, v, sizeof(from));
  for (int i = 0; i < kCount; ++i) {
    Doubles moved{};
    for (int lane = 0; lane < kWidth; ++lane) moved[lane] = from[place(i, lane)];
    v[i] = moved;
  }
}
FUSED_CE_HOST_DEVICE void transpose(Doubles (&v)[kLanes / 2]) {
  move_lanes(v, [](int i, int lane) { return lane * (kLanes / 2) + i; });
}
template <int kCount>
FUSED_CE_HOST_DEVICE void to_columns(Doubles (&v)[kCount]) {
  move_lanes(v, [](int i, int lane) { return lane * kCount + i; });
}
template <int kCount>
FUSED_CE_HOST_DEVICE void to_rows(Doubles (&v)[kCount]) {
  move_lanes(v, [](int i, int lane) {
    int place = i * (kLanes / 2) + lane;
    return place % kCount * (kLanes / 2) + place / kCount;
  });
}

// Calls few.operator()<columns>(row) for groups of kWidth rows of two to four columns, or
// square(row, column) for squares of kWidth rows and columns; returns how many leading rows these
// cover. Where there are fewer columns than kWidth, squares reach into the rows that follow.
template <int kWidth, class Few, class Square>
FUSED_CE_HOST_DEVICE int for_each_square(int rows, int columns, Few few, Square square) {
  int row = 0;
  auto groups = [&]<int kColumns> {
    for (; row + kWidth <= rows; row += kWidth) few.template operator()<kColumns>(row);
    return row;
  };
  if (columns == 2) return groups.template operator()<2>();
  if (columns == 3) return groups.template operator()<3>();
  if (columns == 4) return groups.template operator()<4>();
  int beyond = columns < kWidth ? (kWidth + columns - 1) / columns : 0;
  for (; row + kWidth + beyond <= rows; row += kWidth) {
    for (int k = 0; k < columns; k += kWidth) {
      square(row, columns < kWidth || k + kWidth <= columns ? k : columns - kWidth);
    }
  }
  return row;
}

template <class T, class Real>
FUSED_CE_HOST_DEVICE void rows_to_columns(const T* from,  // [rows][columns]
                                          int rows, int columns,
                                          Real* to,  // [columns][stride]
                                          int stride) {
  using V = typename Computing<Real>::Vector;
  constexpr int kWidth = Computing<Real>::kStep / 2;
  auto few = [&]<int kColumns>(int i) {
    V v[kColumns];
    for (int k = 0; k < kColumns; ++k) v[k] = load(from + i * kColumns + k * kWidth);
    to_columns(v);
    for (int k = 0; k < kColumns; ++k) store(to + k * stride + i, v[k]);
  };
  int row = for_each_square<kWidth>(rows, columns, few, [&](int i, int k) {
    V square[kWidth];
    for (int j = 0; j < kWidth; ++j) {
      const T* p = from + int64_t{i + j} * columns + k;
      // Rows of one vector are one stream, which the processor reads ahead by itself.
      if (columns > kWidth) __builtin_prefetch(p + kAhead<T>);
      square[j] = load(p);
    }
    transpose(square);
    int present = columns < kWidth ? columns : kWidth;
    for (int j = 0; j < present; ++j) store(to + (k + j) * stride + i, square[j]);
  });
  for (int i = row; i < rows; ++i) {
    for (int k = 0; k < columns; ++k) to[k * stride + i] = to_real<Real>(from[i * columns + k]);
  }
}

// The reverse: at(i, k) is column k of the rows from i on.
template <class Real, class T, class At>
FUSED_CE_HOST_DEVICE void columns_to_rows(At at, int rows, int columns,
                                          T* to) {  // [rows][columns]
  using V = typename Computing<Real>::Vector;
  constexpr int kWidth = Computing<Real>::kStep / 2;
  auto few = [&]<int kColumns>(int i) {
    V v[kColumns];
    for (int k = 0; k < kColumns; ++k) v[k] = at(i, k);
    to_rows(v);
    for (int k = 0; k < kColumns; ++k) {
      T* p = to + i * kColumns + k * kWidth;
      __builtin_prefetch(p + kAhead<T>, 1);
      store(p, v[k]);
    }
  };
  int row = for_each_square<kWidth>(rows, columns, few, [&](int i, int k) {
    V square[kWidth];
    int present = columns < kWidth ? columns : kWidth;
    for (int j = 0; j < present; ++j) square[j] = at(i, k + j);
    for (int j = present; j < kWidth; ++j) square[j] = V{};
    transpose(square);
    for (int j = 0; j < kWidth; ++j) {
      T* p = to + int64_t{i + j} * columns + k;
      __builtin_prefetch(p + kAhead<T>, 1);
      store(p, square[j]);
    }
  });
  for (int i = row; i < rows; i += kWidth) {
    for (int k = 0; k < columns; ++k) {
      Real values[kWidth];
      store(values, at(i, k));
      for (int j = 0; j < kWidth && i + j < rows; ++j) {
        to[int64_t{i + j} * columns + k] = from_real<T>(values[j]);
      }
    }
  }
}

}  // namespace
}  // namespace fused_ce
