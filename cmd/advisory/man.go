package main

import (
	"errors"
	"os"
	"runtime/debug"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

func newMan() *cobra.Command {
	var dir string
	cmd := &cobra.Command{
		Use:   "man [COMMAND]",
		Short: "Print a man page, or write all of them",
		Example: `  advisory man run | man -l -
  advisory man --dir /usr/local/share/man/man1`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			root.DisableAutoGenTag = true
			root.InitDefaultCompletionCmd()
			header := &doc.GenManHeader{Section: "1", Source: "advisory " + version(), Manual: "advisory"}
			if dir != "" {
				if len(args) > 0 {
					return errors.New("--dir writes the pages of all commands")
				}
				if err := os.MkdirAll(dir, 0o755); err != nil {
					return &exitError{exitFailed, err}
				}
				if err := doc.GenManTree(root, header, dir); err != nil {
					return &exitError{exitFailed, err}
				}
				return nil
			}
			page, _, err := root.Find(args)
			if err != nil {
				return err
			}
			if err := doc.GenMan(page, header, cmd.OutOrStdout()); err != nil {
				return &exitError{exitFailed, err}
			}
			return nil
		},
		ValidArgsFunction: func(cmd *cobra.Command, _ []string, _ string) (names []cobra.Completion, _ cobra.ShellCompDirective) {
			for _, c := range cmd.Root().Commands() {
				names = append(names, c.Name())
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.Flags().StringVar(&dir, "dir", "", "write the pages of all commands to `DIR`")
	return cmd
}

// version returns the version of the module that this program was built from.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	return strings.Trim(info.Main.Version, "()")
}
