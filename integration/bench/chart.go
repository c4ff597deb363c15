package main

import (
	"bytes"
	"image/color"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// chartBars are the contestants in the chart, from top to bottom, and their colours. The
// floor is left out, which is no lock that one would use.
var chartBars = []struct {
	contestant
	color color.Color
}{
	{contestant{ours, pgx}, color.RGBA{0x1b, 0x5e, 0xc9, 0xff}},
	{contestant{ours, pq}, color.RGBA{0x62, 0x9b, 0xee, 0xff}},
	{contestant{recipe, pgx}, color.RGBA{0x6b, 0x6b, 0x6b, 0xff}},
	{contestant{recipe, pq}, color.RGBA{0xa6, 0xa6, 0xa6, 0xff}},
	{contestant{goose, pgx}, color.RGBA{0xb0, 0x86, 0x3c, 0xff}},
	{contestant{redislock, ""}, color.RGBA{0xc2, 0x4a, 0x3c, 0xff}},
	{contestant{etcd, ""}, color.RGBA{0x3c, 0x96, 0x8c, 0xff}},
}

const (
	chartWidth = 9 * vg.Inch
	laneHeight = 0.2 * vg.Inch
	barHeight  = 0.75 // of a lane
	nameWidth  = 1.25 * vg.Inch
	margin     = 0.15 * vg.Inch
)

// A bar is one contestant's in the chart.
type bar struct {
	name  string
	lane  float64 // its middle
	rate  float64
	color color.Color
}

// bars draws bars, and the workloads' titles above theirs.
type bars struct {
	bars       []bar
	titles     []plot.Tick
	plain      text.Style
	title      text.Style
	least, end float64 // of the axis
}

// chart draws the throughputs.
func (r *report) chart() ([]byte, error) {
	p := plot.New()
	style := func(size font.Length, x text.XAlignment, y text.YAlignment) text.Style {
		s := p.X.Tick.Label
		s.Font = font.Font{Typeface: "Liberation", Variant: "Sans", Size: size}
		s.XAlign, s.YAlign = x, y
		return s
	}
	b := &bars{
		plain: style(9.5, text.XLeft, text.YCenter),
		title: style(11, text.XLeft, text.YCenter),
		least: math.Inf(1),
	}
	b.title.Font.Weight = 2
	p.Title.Text = "Locks taken and released per second"
	p.Title.TextStyle = style(14, text.XCenter, text.YTop)
	p.Title.TextStyle.Font.Weight = 2
	p.Title.Padding = 6

	lanes := 0.0
	for _, w := range workloads {
		first := lanes
		for _, c := range chartBars {
			res, ok := r.find(w, c.Impl, c.Driver)
			if !ok || !w.inChart {
				continue
			}
			if lanes == first {
				lanes += 1.4 // for the title
				b.titles = append(b.titles, plot.Tick{Value: -first - 0.85, Label: w.title})
			}
			b.bars = append(b.bars, bar{c.contestant.String(), -lanes - 0.5, res.rate(), c.color})
			b.least, b.end = min(b.least, res.rate()), max(b.end, res.rate())
			lanes++
		}
	}
	if len(b.bars) == 0 {
		b.least, b.end = 1, 10 // nothing was measured, and this is no place to fail
	}
	b.least = math.Pow(10, math.Floor(math.Log10(b.least)))
	b.end *= 3 // room for the number after the longest bar

	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, decades{}
	p.X.Min, p.X.Max = b.least, b.end
	p.X.Label.Text = "logarithmic scale: from one line to the next it is ten times as many"
	p.X.Label.TextStyle = style(9.5, text.XCenter, text.YTop)
	p.X.Tick.Label = style(9.5, text.XCenter, text.YTop)
	p.HideY()
	p.Y.Min, p.Y.Max = -lanes-0.3, 0
	p.Add(b)

	canvas := vgsvg.New(chartWidth, laneHeight*vg.Length(lanes)+1.2*vg.Inch)
	p.Draw(draw.Crop(draw.New(canvas), nameWidth, -margin, margin, -margin))
	var out bytes.Buffer
	if _, err := canvas.WriteTo(&out); err != nil {
		return nil, err
	}
	// Where the font is missing, its look-alikes have the widths that the text was laid
	// out for.
	return bytes.ReplaceAll(out.Bytes(), []byte("font-family:Liberation Sans"),
		[]byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif")), nil
}

// Plot implements plot.Plotter.
func (b *bars) Plot(c draw.Canvas, p *plot.Plot) {
	x, y := p.Transforms(&c)
	line := draw.LineStyle{Color: color.Gray{0xdd}, Width: 0.5}
	for rate := b.least; rate <= b.end; rate *= 10 {
		c.StrokeLine2(line, x(rate), c.Min.Y, x(rate), c.Max.Y)
	}
	for _, bar := range b.bars {
		c.FillText(b.plain, vg.Point{X: c.Min.X - nameWidth + margin, Y: y(bar.lane)}, bar.name)
		left, right := x(b.least), x(bar.rate)
		top, bottom := y(bar.lane+barHeight/2), y(bar.lane-barHeight/2)
		c.FillPolygon(bar.color, []vg.Point{{X: left, Y: bottom}, {X: right, Y: bottom}, {X: right, Y: top}, {X: left, Y: top}})
		c.FillText(b.plain, vg.Point{X: right + 4, Y: y(bar.lane)}, thousands(roundTo3(bar.rate)))
	}
	for _, t := range b.titles {
		c.FillText(b.title, vg.Point{X: c.Min.X - nameWidth + margin, Y: y(t.Value)}, t.Label)
	}
}

// roundTo3 rounds v to three digits: there are no more in a measurement.
func roundTo3(v float64) float64 {
	unit := math.Pow(10, max(0, math.Floor(math.Log10(v))-2))
	return math.Round(v/unit) * unit
}

// decades are ticks at the powers of ten.
type decades struct{}

// Ticks implements plot.Ticker.
func (decades) Ticks(least, most float64) (ticks []plot.Tick) {
	for v := math.Pow(10, math.Ceil(math.Log10(least))); v <= most; v *= 10 {
		ticks = append(ticks, plot.Tick{Value: v, Label: thousands(v)})
	}
	return ticks
}
