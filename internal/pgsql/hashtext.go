package pgsql

import (
	"encoding/binary"
	"math/bits"
)

// HashText returns what the server's hashtext returns for s. That is Bob Jenkins's lookup3, as
// hash_bytes in PostgreSQL's src/common/hashfn.c has it, on a little-endian machine.
func HashText(s string) int32 {
	a := 0x9e3779b9 + uint32(len(s)) + 3923095
	b, c := a, a
	for ; len(s) >= 12; s = s[12:] {
		a += word(s)
		b += word(s[4:])
		c += word(s[8:])
		a, b, c = mix(a, b, c)
	}
	a += word(s)
	b += word(s[min(4, len(s)):])
	c += word(s[min(8, len(s)):]) << 8 // the lowest byte is the length's
	return int32(final(a, b, c))
}

// word returns the first four bytes of s, or those that there are.
func word(s string) uint32 {
	var w [4]byte
	copy(w[:], s)
	return binary.LittleEndian.Uint32(w[:])
}

func mix(a, b, c uint32) (uint32, uint32, uint32) {
	for _, rot := range [...]int{4, 6, 8, 16, 19, 4} {
		a = (a - c) ^ bits.RotateLeft32(c, rot)
		c += b
		a, b, c = b, c, a // the next round is the same with the next letter
	}
	return a, b, c
}

func final(a, b, c uint32) uint32 {
	for _, rot := range [...]int{14, 11, 25, 16, 4, 14, 24} {
		c = (c ^ b) - bits.RotateLeft32(b, rot)
		a, b, c = b, c, a
	}
	return b
}
